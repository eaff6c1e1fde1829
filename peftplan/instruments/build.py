"""Job -> the real transformers + PEFT model, without weights: on `meta`, then fake CPU tensors (or real, random ones)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peftplan.errors import RequestError, UnknownName, Unsupported
from peftplan.instruments import quantize
from peftplan.job import Job

Mode = Literal["fake", "real"]

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
QUANTIZED = ("nf4", "fp4", "int8")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A Job with every default that the trace needs decided."""

    job: Job
    method: str
    format: str
    dtype: torch.dtype
    """Of the base weights (of what is not packed, where they are quantized)."""
    autocast: torch.dtype | None
    adapter_dtype: torch.dtype | None
    """None leaves PEFT's own rule: half-precision adapters are upcast to float32."""
    seq_len: int
    padded: bool
    recompute: bool
    attention: str
    outputs_until: str
    """The loop keeps the model's outputs (logits, cache) until the next step's replace them."""

    @property
    def quantized(self) -> bool:
        return self.format in QUANTIZED


def decide(job: Job) -> Choices:
    """The choices of `job`; RequestError for what cannot be traced."""
    method = job.method.replace("-", "_").lower()
    precision = (job.precision or "bf16").lower()
    pure = precision.removesuffix("-mixed")
    weights = job.dtype or ("fp32" if precision != pure else pure)
    outputs = str(job.knobs("loop").get("outputs_until", "step"))
    fmt = (job.format or ("nf4" if method == "qlora" else "none")).lower()
    return Choices(
        job=job,
        method="lora" if method == "qlora" else method,
        format=_one_of("format", fmt, (*QUANTIZED, *DTYPES, "none")),
        dtype=_dtype("--dtype", fmt if fmt in DTYPES and job.dtype is None else weights),
        autocast=_dtype("--precision", pure) if precision != pure else None,
        adapter_dtype=None if job.adapter_dtype == "auto" else _dtype("--adapter-dtype", job.adapter_dtype),
        seq_len=job.seq_len or 512,
        padded=_batching(job) == "padded",
        recompute=_one_of("recompute", job.recompute or "none", ("none", "full")) == "full",
        attention=_one_of("attention", job.attention or "sdpa", ("eager", "sdpa")),
        outputs_until=_one_of("set loop.outputs_until", outputs, ("loss", "step", "next")),
    )


def _batching(job: Job) -> str:
    if job.batching == "packed":
        raise Unsupported("the trace cannot run --batching packed yet; use exact or padded")
    return job.batching or "exact"


def _dtype(option: str, name: str, auto: torch.dtype | None = None) -> torch.dtype:
    key = name.removeprefix("torch.").lower()
    if key == "auto" and auto is not None:
        return auto
    if key not in DTYPES:
        raise RequestError(f"{option}: the trace cannot run {name!r}; use one of {', '.join(DTYPES)}")
    return DTYPES[key]


def _one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise Unsupported(f"--{option}: the trace cannot run {value!r}; it can: {', '.join(known)}")
    return value


def config_of(choices: Choices) -> Any:
    """The transformers config of the job, with `model.*` settings laid over it. Nothing in it is executed."""
    from transformers import AutoConfig

    raw = choices.job.config
    if raw is None:
        raise RequestError("the trace needs the model's config.json (job field `config`)")
    keys = {key: value for key, value in raw.items() if key not in ("auto_map", "quantization_config")}
    keys.update(choices.job.knobs("model"))
    family = keys.pop("model_type", None)
    if not isinstance(family, str):
        raise RequestError("the config has no model_type; without it no model class can be chosen")
    try:
        return AutoConfig.for_model(family, **keys)
    except ValueError:
        raise Unsupported(f"transformers has no model_type {family!r}") from None


def base_model(choices: Choices, mode: Mode) -> torch.nn.Module:
    """The causal language model, on `meta` (fake) or with random weights (real), in training mode."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta" if mode == "fake" else "cpu"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config_of(choices), attn_implementation=choices.attention, dtype=choices.dtype
        )
    model.tie_weights()
    if choices.quantized:
        _quantize(model, choices)
    return model


def _quantize(model: torch.nn.Module, choices: Choices) -> None:
    from peft import prepare_model_for_kbit_training

    knobs = choices.job.knobs("format")
    double = bool(knobs.get("double_quant", choices.job.method.lower() == "qlora"))
    compute = _dtype(
        "format.compute_dtype", str(knobs.get("compute_dtype", "auto")), choices.autocast or choices.dtype
    )
    quantize.quantize(model, fmt=choices.format, compute=compute, double=double, job=choices.job)
    if knobs.get("prepare", True):
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def apply_method(model: torch.nn.Module, choices: Choices) -> torch.nn.Module:
    """Freeze or wrap `model` as the job's method says."""
    if choices.method == "full":
        return model.requires_grad_(True)
    if choices.method == "freeze":
        return _freeze(model, choices.job)
    return _adapt(model, choices)


def _freeze(model: torch.nn.Module, job: Job) -> torch.nn.Module:
    knobs = job.knobs("method")
    stack = model.get_decoder().layers
    count = int(knobs.get("layers", 2))
    if not 0 <= count <= len(stack):
        raise RequestError(f"method.layers={count}: the model has {len(stack)} layers")
    model.requires_grad_(False)
    for layer in stack[len(stack) - count :]:
        layer.requires_grad_(True)
    for name in knobs.get("train", ()):
        model.get_submodule(name).requires_grad_(True)
    return model


def _adapt(model: torch.nn.Module, choices: Choices) -> torch.nn.Module:
    from peft import get_peft_model

    # LoRA copies weights (DoRA) and assigns to them (PiSSA): on `meta` that works where new tensors are born there.
    # Other methods read what they draw (BOFT, AdaLoRA), which only works on the CPU.
    with next(model.parameters()).device if choices.method == "lora" else torch.device("cpu"):
        adapted: torch.nn.Module = get_peft_model(model, peft_config(choices))
    cast_adapter(adapted, choices.adapter_dtype)
    return adapted


def peft_config(choices: Choices) -> Any:
    """PEFT's own config object for the job's method; every `method.*` setting must be one of its fields."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {kind.value.lower(): kind for kind in PeftType}
    if choices.method not in known:
        raise UnknownName("method", choices.method, ["full", "freeze", "qlora", *known])
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[known[choices.method]]
    fields = {field.name for field in dataclasses.fields(cls)}
    knobs = {"task_type": "CAUSAL_LM", **choices.job.knobs("method")}
    if choices.job.rank is not None:
        knobs["r"] = choices.job.rank
    if choices.job.target_modules is not None:
        knobs["target_modules"] = _targets(choices.job.target_modules)
    for name in knobs:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3)
            raise RequestError(f"method {choices.method!r} has no setting {name!r}; near: {', '.join(near)}")
    try:
        return cls(**knobs)
    except (TypeError, ValueError) as error:
        raise RequestError(f"method {choices.method!r}: {str(error).splitlines()[0]}") from None


def _targets(targets: str | tuple[str, ...]) -> str | list[str]:
    return targets if isinstance(targets, str) else list(targets)


def cast_adapter(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Give the adapter the dtype it has after loading on a real device.

    PEFT skips both its casts for adapters on `meta`: moving to the base weight's dtype, then upcasting half precision
    to float32 (`peft.tuners.tuners_utils.cast_adapter_dtype`). None does the second; a dtype asks for that one.
    """
    for name, param in _adapter_tensors(model):
        if dtype is not None:
            param.data = param.data.to(dtype)
        elif param.dtype in (torch.float16, torch.bfloat16):
            param.data = param.data.to(torch.float32)
        del name


def _adapter_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            names = (*module.adapter_layer_names, *module.other_param_names)
            for name in names:
                part = getattr(module, name, None)
                if isinstance(part, torch.nn.Module):
                    yield from ((f"{path}.{name}.{key}", p) for key, p in part.named_parameters())


def checkpoint_layers(model: torch.nn.Module, job: Job) -> None:
    """Turn on full recomputation the way transformers does."""
    base = getattr(model, "base_model", model)
    reentrant = job.knobs("recompute").get("use_reentrant")
    kwargs = None if reentrant is None else {"use_reentrant": bool(reentrant)}
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def to_fake(model: torch.nn.Module) -> None:
    """Replace every tensor of `model` by a fake CPU tensor. Tied parameters stay tied, views keep their storage."""
    memo: dict[int, torch.Tensor] = {}
    flat: dict[int, torch.Tensor] = {}
    for module in model.modules():
        packed = quantize.fake_weight(module)
        if packed is not None:
            memo[id(module._parameters["weight"])] = packed
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = _fake(tensor, memo, flat)  # type: ignore[assignment]
    for _, owner, key, tensor in loose_tensors(model):
        owner[key] = _fake(tensor, memo, flat)


def _fake(tensor: torch.Tensor, memo: dict[int, torch.Tensor], flat: dict[int, torch.Tensor]) -> torch.Tensor:
    if id(tensor) not in memo:
        storage = tensor.untyped_storage()
        if storage._cdata not in flat:
            size = storage.nbytes() // tensor.element_size()
            flat[storage._cdata] = torch.empty(size, dtype=tensor.dtype, device="cpu")
        view = flat[storage._cdata].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(view, tensor.requires_grad) if is_parameter else view
    return memo[id(tensor)]


def loose_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Any, Any, torch.Tensor]]:
    """Tensors that modules hold as plain attributes, or in a dict or list: name, owner, key, tensor."""
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}", vars(module), name, value
            elif isinstance(value, (dict, list)) and name not in ("_parameters", "_buffers"):
                for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                    if isinstance(item, torch.Tensor):
                        yield f"{path}.{name}.{key}", value, key, item
