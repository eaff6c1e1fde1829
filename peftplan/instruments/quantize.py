"""bitsandbytes weights for the trace: the modules and sizes that transformers and bitsandbytes make.

Sizes come from bitsandbytes' own quantization operators (their fake kernels on `meta` and on fake tensors,
their CPU kernels on real ones), so nothing about packing is restated here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peftplan.errors import RequestError
from peftplan.instruments import packers, placing
from peftplan.job import Job
from peftplan.units import parse_dtype


def quantize(
    model: torch.nn.Module,
    *,
    fmt: str,
    compute: torch.dtype,
    double: bool,
    job: Job,
    place: torch.device | None = None,
) -> None:
    """Replace the linears that transformers would, and pack their weights; on `place`, one after another, where given.

    Follows `transformers.quantizers.quantizer_bnb_4bit`/`_8bit`: the head and tied modules stay as they are.
    """
    import bitsandbytes as bnb

    # The code book is a cache that all layers share; made here so that no fake tensor gets into it.
    bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())
    sources = {name: module for name, module in model.named_modules() if _is_linear(module)}
    quantizer = _quantizer(fmt, compute, double, str(job.knobs("format").get("quant_storage", "uint8")))
    quantizer.preprocess_model(model, device_map={"": "cpu" if place is None else place})

    def pack(name: str, module: torch.nn.Module) -> bool:
        if not isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            return False
        _pack(module, sources[name], job, place)
        return True

    if place is None:
        for name, module in model.named_modules():
            pack(name, module)
    else:
        placing.warm_up(model, place, job, quantizer)
        placing.fill(model, place, by_name=True, pack=pack)
    quantizer.postprocess_model(model)


def make_tables() -> None:
    """bitsandbytes' code books, which it makes when it first packs and keeps; here on the host."""
    from bitsandbytes.functional import quantize_4bit

    quantize_4bit(torch.ones(64, 64), quant_type="nf4", compress_statistics=True)


def _quantizer(fmt: str, compute: torch.dtype, double: bool, storage: str) -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    if fmt == "int8":
        return Bnb8BitHfQuantizer(BitsAndBytesConfig(load_in_8bit=True), pre_quantized=False)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=fmt,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=parse_dtype(storage).label,
    )
    return Bnb4BitHfQuantizer(config, pre_quantized=False)


def _is_linear(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def _pack(module: Any, source: Any, job: Job, place: torch.device | None) -> None:
    import bitsandbytes as bnb

    rows = source.weight.data if isinstance(source, torch.nn.Linear) else source.weight.data.T
    if place is not None:
        rows = placing.drawn(rows, place)
    module.bias = source.bias
    if isinstance(module, bnb.nn.Linear8bitLt):
        weight = bnb.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False)
    else:
        kept = dict(module.weight.__dict__)
        kept["blocksize"] = _blocksize(job, kept["blocksize"])
        weight = bnb.nn.Params4bit(rows, requires_grad=False, **kept)
    module.weight = weight._quantize(rows.device)


def numel(param: torch.nn.Parameter) -> int:
    """How many weights a parameter stands for: 4-bit ones are packed two to a byte of their storage dtype."""
    count: int = param.numel()
    return 2 * count * int(param.element_size()) if type(param).__name__ == "Params4bit" else count


def _blocksize(job: Job, default: int) -> int:
    size = int(job.knobs("format").get("blocksize", default))
    if size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise RequestError(f"format.blocksize={size}: bitsandbytes packs blocks of a power of 2 from 32 to 4096")
    return size


def fake_weight(module: torch.nn.Module) -> torch.nn.Parameter | None:
    """A fake CPU stand-in for the packed weight of `module` with its quantization state; None if it has none.

    A FakeTensor cannot be of bitsandbytes' parameter class, so the state rides on it as attributes.
    """
    import bitsandbytes as bnb

    if isinstance(module, bnb.nn.Linear8bitLt):
        return _fake_int8(module)
    if isinstance(module, bnb.nn.Linear4bit):
        return _fake_4bit(module)
    return None


def _fake_4bit(module: Any) -> torch.nn.Parameter:
    import bitsandbytes as bnb

    old = module.weight
    packed, state = bnb.functional.quantize_4bit(
        torch.empty(old.quant_state.shape, dtype=old.quant_state.dtype, device="cpu"),
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
    )
    new = torch.nn.Parameter(packed, requires_grad=False)
    attributes = {**old.__dict__, "quant_state": state, "module": module}
    for name, value in attributes.items():
        setattr(new, name, value)
    module.quant_state = state
    return new


def _fake_int8(module: Any) -> torch.nn.Parameter:
    import bitsandbytes as bnb

    rows = torch.empty(module.weight.shape, dtype=torch.float16, device="cpu")
    packed, scale, _ = bnb.functional.int8_vectorwise_quant(rows)
    new: Any = torch.nn.Parameter(packed, requires_grad=False)
    new.CB, new.SCB, new.has_fp16_weights = new.data, scale, False
    return new


def state_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every quantization constant of `model`: name and tensor (tensors may be shared between modules)."""
    for path, module in model.named_modules():
        for name, value in _constants(module):
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}", value


def _constants(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    import bitsandbytes as bnb

    yield from packers.constants(module)
    if isinstance(module, bnb.nn.Linear8bitLt):
        yield "SCB", module.state.SCB if module.weight.SCB is None else module.weight.SCB
    elif isinstance(module, bnb.nn.Linear4bit):
        state = vars(module.weight).get("quant_state") or module.quant_state
        yield from (("absmax", state.absmax), ("code", state.code), ("offset", state.offset))
        if state.state2 is not None:
            yield from (("nested_absmax", state.state2.absmax), ("nested_code", state.state2.code))


def opened() -> dict[str, Any]:
    """The libraries' operators whose CPU kernel is Python that calls other operators."""
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    return {"bitsandbytes.gemm_4bit.default": _gemm_4bit_default_impl, **packers.opened()}


def _dequantized(weight: Any, scale: Any = None) -> torch.Tensor | None:
    """The weight that a fake packed one stands for; None for what is not packed."""
    import bitsandbytes as bnb

    constants = vars(weight)
    if "quant_state" in constants:
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    if "SCB" in constants:
        scale = weight.SCB if scale is None else scale
        return bnb.functional.int8_vectorwise_dequant(weight.data, scale)
    return None


@contextmanager
def recognised() -> Iterator[None]:
    """Let PEFT dequantize fake packed weights, which it knows by their class name only (DoRA and others)."""
    integrations: Any = sys.modules.get("peft.utils.integrations")
    if integrations is None:  # nothing of PEFT is in this model
        yield
        return
    of_weight, of_module = integrations.dequantize_bnb_weight, integrations.dequantize_module_weight

    def from_weight(weight: Any, state: Any = None) -> Any:
        found = _dequantized(weight, getattr(state, "SCB", None))
        return of_weight(weight, state=state) if found is None else found

    def from_module(module: Any) -> Any:
        found = _dequantized(module.weight, getattr(getattr(module, "state", None), "SCB", None))
        return of_module(module) if found is None else found

    with _replaced({"dequantize_bnb_weight": from_weight, "dequantize_module_weight": from_module}, integrations):
        yield


@contextmanager
def _replaced(functions: dict[str, Any], home: Any) -> Iterator[None]:
    """Replace functions of module `home` there and wherever PEFT imported them by name."""
    originals = {name: vars(home)[name] for name in functions}
    loaded = [module for path, module in sys.modules.items() if path.startswith("peft.")]
    users = [(m, name) for m in loaded for name in functions if vars(m).get(name) is originals[name]]
    for module, name in users:
        setattr(module, name, functions[name])
    try:
        yield
    finally:
        for module, name in users:
            setattr(module, name, originals[name])
