"""Weights that other libraries than bitsandbytes pack, for the trace: their own tensors on the CPU.

transformers' quantizers say which layers, and quantize them as from_pretrained does; hqq's layers are made as
AutoHQQHFModel makes them, since transformers 5 does not, and torchao's NF4 as torchtune does. The weights need values:
these formats are traced in mode `real`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from peftplan import formats
from peftplan.errors import Unsupported
from peftplan.formats.base import Format
from peftplan.job import Job

Packer = Callable[[torch.nn.Module, Any, torch.dtype], None]


def pack(model: torch.nn.Module, name: str, job: Job, dtype: torch.dtype, place: torch.device | None = None) -> bool:
    """Pack the linear layers of `model` in format `name` with the job's settings; whether it is to be prepared then.

    Raises Unsupported for a place other than the CPU.
    """
    if place is not None:
        raise Unsupported(f"--format {name}: the trace packs it on the CPU only; use nf4, fp4 or int8")
    fmt: Format = formats.make(name, job.knobs("format"))
    PACKERS[name](model, fmt, dtype)
    return fmt.prepares or fmt.upcasts_rest


def _torchao(config: Callable[[Any], Any]) -> Packer:
    def packer(model: torch.nn.Module, fmt: Any, dtype: torch.dtype) -> None:
        del dtype
        from transformers import TorchAoConfig
        from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

        _convert(model, TorchAoHfQuantizer(TorchAoConfig(config(fmt)), pre_quantized=False))

    return packer


def _convert(model: Any, quantizer: Any) -> None:
    """What core_model_loading.py does with each weight as it arrives."""
    quantizer.validate_environment(device_map=None)
    weights = {name: param.data for name, param in model.named_parameters()}
    quantizer.preprocess_model(model)
    operation = quantizer.get_quantize_ops()
    for name, value in weights.items():
        if quantizer.param_needs_quantization(model, name):
            operation.convert({name: [value]}, model=model, full_layer_name=name, missing_keys=set())
        else:
            _put(model, name, value)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def _put(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if module._parameters[key] is not None and module._parameters[key].device.type == "meta":
        module._parameters[key] = torch.nn.Parameter(value, requires_grad=False)


def _granularity(fmt: Any) -> Any:
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor

    if fmt.group_size is not None:
        return PerGroup(fmt.group_size)
    return PerRow() if fmt.granularity == "row" else PerTensor()


def _int8(fmt: Any) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    kind = Int8DynamicActivationInt8WeightConfig if fmt.cuts else Int8WeightOnlyConfig
    return kind(granularity=_granularity(fmt), set_inductor_config=False)


def _float8(fmt: Any) -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig

    kind = Float8DynamicActivationFloat8WeightConfig if fmt.cuts else Float8WeightOnlyConfig
    return kind(granularity=_granularity(fmt), set_inductor_config=False)


def _nf4(model: torch.nn.Module, fmt: Any, dtype: torch.dtype) -> None:
    del dtype
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    for _, linear in _linears(model):
        packed = to_nf4(linear.weight.detach(), fmt.block_size, fmt.scaler_block_size)
        linear.weight = torch.nn.Parameter(packed, requires_grad=False)


def _quanto(model: torch.nn.Module, fmt: Any, dtype: torch.dtype) -> None:
    if fmt.weights == "int8" and dtype is torch.bfloat16:
        raise Unsupported(
            "torch's kernel for bf16 times int8 (_weight_int8pack_mm) crashes on a CPU for some shapes; trace quanto's "
            "int8 with --dtype fp32"
        )
    from transformers import QuantoConfig
    from transformers.quantizers.quantizer_quanto import QuantoHfQuantizer

    _convert(model, QuantoHfQuantizer(QuantoConfig(weights=fmt.weights), pre_quantized=False))


def _hqq(model: Any, fmt: Any, dtype: torch.dtype) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    own = {"nbits": fmt.nbits, "group_size": fmt.group_size, "axis": fmt.axis, "view_as_float": fmt.view_as_float}
    for path, linear in _linears(model):
        linear.requires_grad_(False)
        made = HQQLinear(linear, BaseQuantizeConfig(**own), compute_dtype=dtype, device="cpu")
        model.set_submodule(path, made)
    model.hqq_quantized = True


def _linears(model: Any) -> list[tuple[str, torch.nn.Linear]]:
    """The linear layers but for the head."""
    head = model.get_output_embeddings()
    return [(p, m) for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]


PACKERS: Mapping[str, Packer] = {
    "hqq": _hqq,
    "quanto": _quanto,
    "torchao_float8": _torchao(_float8),
    "torchao_int8": _torchao(_int8),
    "torchao_nf4": _nf4,
}


def constants(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors beside its weight that a packed layer holds."""
    if type(module).__name__ == "HQQLinear":
        made: dict[str, Any] = vars(module)["meta"]
        own = {**made, "bias": vars(module).get("bias")}
        yield from ((name, value) for name, value in own.items() if isinstance(value, torch.Tensor))
    elif type(module).__name__ == "QLinear":
        yield from ((name, module._buffers[name]) for name in ("input_scale", "output_scale"))


def numel(module: torch.nn.Module) -> Iterator[tuple[int, int]]:
    """Of packed parameters that do not say how many weights they stand for: their id and that. hqq's bias is no
    parameter, and counted with it."""
    for part in module.modules():
        if type(part).__name__ == "HQQLinear":
            rows, columns = vars(part)["meta"]["shape"]
            bias = vars(part).get("bias")
            yield id(part._parameters["W_q"]), rows * columns + (0 if bias is None else bias.numel())


def opened() -> dict[str, Any]:
    """quanto's operators whose kernel is Python that calls other operators."""
    return {"quanto.qbytes_mm.default": _quanto_product}


def _quanto_product(x: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Its kernel for the CPU, which torch.library keeps to itself, chooses between these."""
    from optimum.quanto.library.qbytes_mm import qbytes_int8pack_mm, qbytes_mm

    direct = x.dtype is torch.bfloat16 and weights.dtype is torch.int8 and x.shape[-1] % 4 == 0
    product: torch.Tensor = (qbytes_int8pack_mm if direct else qbytes_mm)(x, weights, scales)
    return product
