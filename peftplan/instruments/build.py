"""Job -> the real transformers + PEFT model: on `meta` without weights, or on the CPU with random ones."""

from __future__ import annotations

import dataclasses
import difflib
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from peftplan import formats, methods
from peftplan.errors import RequestError, UnknownName, Unsupported
from peftplan.instruments import adapterhub, float8, packers, placing, prequantized, quantize, ranks, recompute
from peftplan.instruments.casting import cast_adapter
from peftplan.instruments.clusters import dealt
from peftplan.job import Job
from peftplan.layouts import Layout
from peftplan.process import load_knobs

Mode = Literal["fake", "real"]

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
QUANTIZED = ("nf4", "fp4", "int8", *prequantized.FORMATS, *packers.PACKERS)
UNWRAPPED = ("full", "freeze", "bitfit")
"""Methods that leave the model as it is, without PEFT."""
WITH_VALUES = ("shira", "cpt", "frod")
"""Methods that no fake tensor stands in for: SHiRA's indices are read, and its sparse tensors have no fake parts; the
shapes of CPT's loss and of FRoD's sparse factors depend on values."""


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
    layout: Layout
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


CPU_ATTENTION = ("eager", "sdpa", "sdpa_math", "sdpa_flash")
CUDA_ATTENTION = (*CPU_ATTENTION, "sdpa_efficient", "flash_attention_2")


def decide(job: Job, attention: tuple[str, ...] = CPU_ATTENTION) -> Choices:
    """The choices of `job`; RequestError for what cannot be traced, or run with these implementations of attention."""
    method, job = _variant(job, job.method.replace("-", "_").lower())
    precision = (job.precision or "bf16").lower()
    pure = precision.removesuffix("-mixed").replace("fp8", "bf16")
    weights = job.dtype or ("fp32" if precision.endswith("-mixed") else pure)
    until = str(job.knobs("loop").get("outputs_until", "step"))
    fmt = formats.canonical(job.format or ("nf4" if job.method.lower() == "qlora" else "none"))
    return Choices(
        job=job,
        method=method,
        format=_one_of("format", fmt, (*QUANTIZED, *DTYPES, "none")),
        dtype=_dtype("--dtype", fmt if fmt in DTYPES and job.dtype is None else weights),
        autocast=_dtype("--precision", pure) if precision.endswith("-mixed") else None,
        adapter_dtype=None if job.adapter_dtype == "auto" else _dtype("--adapter-dtype", job.adapter_dtype),
        seq_len=job.seq_len or 512,
        padded=_batching(job) == "padded",
        recompute=recompute.of(job).layers,
        attention=_one_of("attention", job.attention or "sdpa", attention),
        layout=ranks.layout_of_job(job),
        outputs_until=_one_of("set loop.outputs_until", until, ("loss", "step", "next")),
    )


def _variant(job: Job, method: str) -> tuple[str, Job]:
    """The method that a name stands for, and the job with the settings that the name implies; AdapterHub's own names
    stay."""
    if method not in methods.aliases() or adapterhub.belongs(method):
        return method, job
    file, implied = methods.resolve_name(method)
    settings = {**{f"method.{key}": value for key, value in implied.items()}, **job.settings}
    return file, job.model_copy(update={"settings": settings}) if implied else job


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


def base_model(choices: Choices, mode: Mode, place: torch.device | None = None) -> torch.nn.Module:
    """The causal language model, on `meta` (fake) or with random weights (real), in training mode; `place` is where
    real weights are put one after another as loading puts them there, packed ones packed on arrival."""
    model = plain_model(choices, mode, place)
    if choices.job.precision == "fp8":
        float8.convert(model)
    if choices.quantized:
        _quantize(model, choices, place)
    elif place is not None:
        on_device = load_knobs(choices.job).on_device
        if on_device:
            placing.warm_up(model, place, choices.job)
        placing.fill(model, place, by_name=on_device)
    return model


def plain_model(choices: Choices, mode: Mode, place: torch.device | None = None) -> torch.nn.Module:
    """The same before anything is packed or placed."""
    from transformers import AutoModelForCausalLM

    attention = choices.attention.partition("_")[0] if choices.attention.startswith("sdpa") else choices.attention
    home = torch.device("meta" if mode == "fake" else "cpu") if place is None else placing.unplaced()
    with home, ranks.untied(choices.layout):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config_of(choices), attn_implementation=attention, dtype=choices.dtype
        )
    model = ranks.spread(model, choices.layout)
    model.tie_weights()
    return model


def _quantize(model: torch.nn.Module, choices: Choices, place: torch.device | None) -> None:
    knobs = choices.job.knobs("format")
    if choices.format in prequantized.FORMATS:
        prequantized.replace_linears(model, choices.format, knobs)
        return
    prepares = knobs.get("prepare", True)
    if choices.format in packers.PACKERS:
        prepares = packers.pack(model, choices.format, choices.job, choices.dtype, place)
    else:
        double = bool(knobs.get("double_quant", choices.job.method.lower() == "qlora"))
        named = str(knobs.get("compute_dtype", "auto"))
        compute = _dtype("format.compute_dtype", named, choices.autocast or choices.dtype)
        quantize.quantize(model, fmt=choices.format, compute=compute, double=double, job=choices.job, place=place)
    if prepares:
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
    if choices.method == "adalora":
        return _adalora(model, choices)
    if choices.method == "xlora":
        return _xlora(model, choices)
    return _adapt(model, choices)


def _hub_dtype(model: torch.nn.Module, choices: Choices) -> torch.dtype | None:
    """What the new weights are cast to: outside autocast those of a half-precision model do not run in float32."""
    if choices.adapter_dtype is not None or choices.autocast is not None:
        return choices.adapter_dtype
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


def _adalora(model: torch.nn.Module, choices: Choices) -> torch.nn.Module:
    """`update_and_allocate` is the loop's call (see `step`), `trains_ranknum` what PEFT's releases differ in."""
    model = _adapt(model, choices)
    if not choices.job.knobs("method").get("trains_ranknum", True):  # before peft 0.21.0
        for name, param in model.named_parameters():
            if ".ranknum." in name:
                param.requires_grad_(False)
    return model


def _xlora(model: torch.nn.Module, choices: Choices) -> torch.nn.Module:
    """X-LoRA over `method.adapters` LoRAs of the job's rank and modules. It loads them from files, which need not hold
    a weight: what is missing stays as it was drawn. It applies only those that are named by their number."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    job, knobs = choices.job, choices.job.knobs("method")
    adapters, rank = knobs.get("adapters", 2), job.rank or knobs.get("r", 8)
    count = adapters if isinstance(adapters, int) else len(adapters)
    model.config.use_cache = False  # it refuses a model that builds a cache
    with tempfile.TemporaryDirectory() as folder:
        targets = _as_peft_has_it(job.target_modules or knobs.get("target_modules"))
        LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(folder)
        save_file({}, str(Path(folder, "adapter_model.safetensors")))
        own = {
            "method.hidden_size": model.config.hidden_size,
            "method.adapters": {str(i): folder for i in range(count)},
        }
        its = {key: value for key, value in job.settings.items() if key not in ("method.r", "method.target_modules")}
        given = job.model_copy(update={"settings": {**its, **own}, "rank": None, "target_modules": None})
        return _adapt(model, dataclasses.replace(choices, job=given))


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
    device = next(model.parameters()).device if choices.method == "lora" else torch.device("cpu")
    with device, dealt() if choices.method == "adamss" else nullcontext():
        raised = choices.adapter_dtype in (None, torch.float32)
        config = peft_config(choices)
        adapted: torch.nn.Module = get_peft_model(model, config, autocast_adapter_dtype=raised)
        _add_adapters(adapted, choices)
        _untie_upcast(adapted)
    for module in adapted.modules():  # KaSA decomposes weights when it is put on, on `meta` at the first forward
        vars(module).get("_lora_kasa_truncation_deferred", set()).clear()
    if choices.method != "ln_tuning":  # its copies keep their dtype: LNTuningModel._cast_adapter_dtype
        cast_adapter(adapted, choices.adapter_dtype)
    return adapted


def _untie_upcast(model: torch.nn.Module) -> None:
    """A tied head's adapter views the embedding's; PEFT's upcast from half precision, which `meta` does not need,
    makes it a tensor of its own."""
    from peft.tuners.lora import Linear

    for module in model.modules():
        if isinstance(module, Linear) and module.get_base_layer().weight.dtype in (torch.float16, torch.bfloat16):
            for param in (*module.lora_A.parameters(), *module.lora_B.parameters()):
                param.data = param.data.clone()


def _add_adapters(model: Any, choices: Choices) -> None:
    """Load more adapters like the first, and activate and train as many as the job says."""
    knobs = choices.job.knobs("method") if choices.method == "lora" else {}
    names = ["default", *(f"adapter_{i}" for i in range(1, int(knobs.get("adapters", 1))))]
    if len(names) == 1:
        return
    for name in names[1:]:
        model.add_adapter(name, peft_config(choices))
    active = names[: int(knobs.get("active_adapters", 1))]
    model.base_model.set_adapter(active)
    trained = knobs.get("trained_adapters")
    if trained is not None:
        model.set_requires_grad(active[int(trained) :], requires_grad=False)


def peft_config(choices: Choices) -> Any:
    """PEFT's own config object for the job's method; every `method.*` setting must be one of its fields."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {kind.value.lower(): kind for kind in PeftType}
    if choices.method not in known:
        raise UnknownName("method", choices.method, [*UNWRAPPED, "lora_fa", "qlora", *known])
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[known[choices.method]]
    fields = {field.name for field in dataclasses.fields(cls)}
    loops = methods.get(choices.method).loop_knobs if choices.method in methods.names() else frozenset[str]()
    asked = choices.job.knobs("method").items()
    knobs = {"task_type": "CAUSAL_LM", **{name: _as_peft_has_it(value) for name, value in asked if name not in loops}}
    if choices.job.rank is not None:
        knobs["r"] = choices.job.rank
    if choices.job.target_modules is not None:
        knobs["target_modules"] = _as_peft_has_it(choices.job.target_modules)
    for name in knobs:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=3)
            raise RequestError(f"method {choices.method!r} has no setting {name!r}; near: {', '.join(near)}")
    try:
        return cls(**knobs)
    except (TypeError, ValueError) as error:
        raise RequestError(f"method {choices.method!r}: {str(error).splitlines()[0]}") from None


def _as_peft_has_it(value: Any) -> Any:
    """PEFT asks for lists where a Job holds tuples."""
    return list(value) if isinstance(value, tuple) else value


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder's layers, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
