"""Job -> the real transformers + PEFT model: on `meta` without weights, or on the CPU with random ones."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from peftplan.errors import RequestError, UnknownName, Unsupported
from peftplan.instruments import adapterhub, quantize
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
UNWRAPPED = ("full", "freeze", "bitfit")
"""Methods that leave the model as it is, without PEFT."""


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
    """When the loop lets go of the model's outputs: at the `loss`, after the `step`, at the `next` step's."""

    @property
    def quantized(self) -> bool:
        return self.format in QUANTIZED

    @property
    def wrapped(self) -> bool:
        """Whether PEFT puts a model of its own around this one."""
        return self.method not in UNWRAPPED and not self.hub

    @property
    def hub(self) -> bool:
        """Whether the method is one of AdapterHub's."""
        return adapterhub.belongs(self.method)


def decide(job: Job) -> Choices:
    """The choices of `job`; RequestError for what cannot be traced."""
    method = job.method.replace("-", "_").lower()
    precision = (job.precision or "bf16").lower()
    pure = precision.removesuffix("-mixed")
    weights = job.dtype or ("fp32" if precision != pure else pure)
    until = str(job.knobs("loop").get("outputs_until", "step"))
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
        attention=_one_of("attention", job.attention or "sdpa", ("eager", "sdpa", "sdpa_math", "sdpa_flash")),
        outputs_until=_one_of("set loop.outputs_until", until, ("loss", "step", "next")),
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
            config_of(choices), attn_implementation=choices.attention.partition("_")[0], dtype=choices.dtype
        )
    model.tie_weights()
    if choices.quantized:
        _quantize(model, choices)
    return model


def _quantize(model: torch.nn.Module, choices: Choices) -> None:
    knobs = choices.job.knobs("format")
    double = bool(knobs.get("double_quant", choices.job.method.lower() == "qlora"))
    compute = _dtype("format.compute_dtype", str(knobs.get("compute_dtype", "auto")), choices.autocast or choices.dtype)
    quantize.quantize(model, fmt=choices.format, compute=compute, double=double, job=choices.job)
    if knobs.get("prepare", True):
        from peft import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def apply_method(model: torch.nn.Module, choices: Choices) -> torch.nn.Module:
    """Freeze or wrap `model` as the job's method says."""
    if choices.method == "full":
        return model.requires_grad_(True)
    if choices.hub:
        return adapterhub.adapt(model, choices.job, _hub_dtype(model, choices))
    if choices.method == "freeze":
        return _freeze(model, choices.job)
    if choices.method == "bitfit":
        return _bitfit(model, choices.job)
    if choices.method == "lora_fa":  # peft.optimizers.create_lorafa_optimizer
        model = _adapt(model, dataclasses.replace(choices, method="lora"))
        for name, param in model.named_parameters():
            if ".lora_A." in name:
                param.requires_grad_(False)
        return model
    return _adapt(model, choices)


def _hub_dtype(model: torch.nn.Module, choices: Choices) -> torch.dtype | None:
    """What the new weights are cast to: outside autocast those of a half-precision model do not run in float32."""
    if choices.adapter_dtype is not None or choices.autocast is not None:
        return choices.adapter_dtype
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


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


def _bitfit(model: torch.nn.Module, job: Job) -> torch.nn.Module:
    wanted = job.knobs("method").get("train")
    endings = tuple(f".{name}.bias" for name in wanted) if wanted else (".bias",)
    for name, param in model.named_parameters():
        param.requires_grad_(f".{name}".endswith(endings))
    return model


def _adapt(model: torch.nn.Module, choices: Choices) -> torch.nn.Module:
    from peft import get_peft_model

    # LoRA copies weights (DoRA) and assigns to them (PiSSA): on `meta` that works only if new tensors are
    # born there. Other methods read what they draw (BOFT, AdaLoRA), which works only on the CPU.
    with next(model.parameters()).device if choices.method == "lora" else torch.device("cpu"):
        adapted: torch.nn.Module = get_peft_model(model, peft_config(choices))
    if choices.method != "ln_tuning":  # its copies keep their dtype: LNTuningModel._cast_adapter_dtype
        cast_adapter(adapted, choices.adapter_dtype)
    return adapted


def peft_config(choices: Choices) -> Any:
    """PEFT's own config object for the job's method; every `method.*` setting must be one of its fields."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {kind.value.lower(): kind for kind in PeftType}
    if choices.method not in known:
        raise UnknownName("method", choices.method, [*UNWRAPPED, "lora_fa", "qlora", *known])
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

    PEFT skips its casts for adapters on `meta`: to the base weight's dtype, then half precision up to float32
    (`peft.tuners.tuners_utils.cast_adapter_dtype`). None does the second; a dtype asks for that one.
    """
    for param in _adapter_parameters(model):
        if dtype is not None:
            param.data = param.data.to(dtype)
        elif param.dtype in (torch.float16, torch.bfloat16):
            param.data = param.data.to(torch.float32)
    if dtype is not None:
        _cast_buffers(model, dtype)


def _cast_buffers(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """What layers keep beside their parameters goes with them (`_move_adapter_to_device_of_base_layer`)."""
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for part in (getattr(module, name, None) for name in module.other_param_names):
                if isinstance(part, BufferDict):
                    part.update({k: t.to(dtype) if t.is_floating_point() else t for k, t in part.items()})


def _adapter_parameters(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in (*module.adapter_layer_names, *module.other_param_names):
                part = getattr(module, name, None)
                if isinstance(part, torch.nn.Module):
                    yield from part.parameters()


def checkpoint_layers(model: torch.nn.Module, job: Job) -> None:
    """Turn on full recomputation the way transformers does."""
    if adapterhub.belongs(job.method):
        adapterhub.checkpoint_layers(model, job)
        return
    base = getattr(model, "base_model", model)
    reentrant = job.knobs("recompute").get("use_reentrant")
    kwargs = None if reentrant is None else {"use_reentrant": bool(reentrant)}
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
