"""A Python script: transformers' Trainer with any method of PEFT.

Reads: scripts that peftplan wrote, whose choices are one literal (`CONFIG = {...}`); nothing in them is run.
Writes: the script, an accelerate YAML where there are several GPUs, and the command.
Not expressed: initialisations that need data or the unpacked weights first (EVA, CorDA, LoftQ).
Defaults: none; everything that moves memory is in CONFIG. A key of `arguments` that is taken out falls back to
transformers 5.23.0 (training_args.py): micro-batch 8, torch's fused AdamW, no checkpointing, no autocast.
Does: prepares a quantized base with PEFT's prepare_model_for_kbit_training; holds whole logits in the loss and lets
go of them before backward (trainer.py, compute_loss); builds no KV cache (training_args.py, use_cache).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, final

from peftplan import methods
from peftplan.errors import RequestError
from peftplan.job import Job
from peftplan.trainers import _accelerate, _huggingface, _optimizers, _recompute
from peftplan.trainers.base import Folder, Run, Trainer
from peftplan.trainers.rules import Config, Fields, Inexpressible, always, custom, keeps, same, under, words
from peftplan.units import parse_dtype

_OWN_FIELD = {"r": "rank", "target_modules": "target_modules"}
_ORDER = ("model", "method", "settings", "variant", "adapter_dtype", "quantization", "prepare", "data", "arguments")
_OWN = ("full", "freeze", "bitfit")
"""Methods that the script does itself."""
_MORE = {
    "cpt": "inputs whose tokens are marked by kind",
    "xlora": "adapters that were trained before",
    "shadow": "a second model with a loss of its own",
}
"""Methods of PEFT's that need what no row of text says."""
_OF_TASKS = ("multitask_prompt_tuning", "poly")
_UNPREPARED = ("eva", "corda", "loftq")
_UNPACKED_ONLY = ("pissa", "olora")
"""Initialisations that decompose the base's weights, which PEFT cannot read from packed ones."""


def _read_method(config: Config) -> Fields:
    method = config.get("method")
    known = [name for name in methods.names() if _scripted(name)]
    if method not in known:
        raise RequestError(f"method: {method!r} is not one of {', '.join(known)}")
    knobs: dict[str, Any] = {}
    for key, value in config.items():
        section, _, name = key.partition(".")
        knob, _, entry = name.partition(".")
        if section == "settings" and entry:
            knobs.setdefault(knob, {})[entry] = value
        elif section == "settings" and knob:
            knobs[knob] = value
    fields = {_field(knob): value for knob, value in knobs.items() if not (knob == "r" and not value)}
    return {"method": method, **fields}


def _scripted(method: str) -> bool:
    return method in _OWN or ("PEFT" in methods.get(method).libraries and method not in _MORE)


def _field(knob: str) -> str:
    return _OWN_FIELD.get(knob, f"method.{knob}")


def _write_method(fields: Fields) -> Config:
    _refuse(fields)
    options = {knob: fields[field] for knob, field in _OWN_FIELD.items() if fields.get(field)}
    knobs = {field.partition(".")[2]: value for field, value in fields.items() if field.startswith("method.")}
    known = methods.settings_of(fields["method"])[0]
    knobs = {knob: value for knob, value in knobs.items() if knob not in methods.get(fields["method"]).loop_knobs}
    settings = {knob: value for knob, value in options.items() if knob in known} | knobs
    return {"method": fields["method"], **{f"settings.{knob}": _listed(value) for knob, value in settings.items()}}


def _refuse(fields: Fields) -> None:
    method = fields["method"]
    if not _scripted(method):
        raise Inexpressible("method", f"{method}, which needs {_MORE[method]}" if method in _MORE else method)
    plain = methods.make(method, methods.example(method))
    for knob in methods.get(method).loop_knobs:
        if fields.get(f"method.{knob}", plain.knob(knob)) != plain.knob(knob):
            raise Inexpressible(f"method.{knob}", str(fields[f"method.{knob}"]))
    start = fields.get("method.init_lora_weights")
    if start in _UNPREPARED or (start in _UNPACKED_ONLY and "format" in fields):
        raise Inexpressible(
            "method.init_lora_weights", f"{start}" + (" on packed weights" if "format" in fields else "")
        )
    if fields["method"] in _OF_TASKS and fields["batching"] != "padded":
        raise Inexpressible("batching", f"{fields['batching']} with rows of several tasks")
    if fields["method"] == "lora_fa" and (fields["optimizer"], fields.get("optimizer.impl", "auto")) != (
        "adamw",
        "auto",
    ):
        raise Inexpressible("optimizer", f"{fields['optimizer']} with lora_fa, which brings its own")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _write_compute(fields: Fields) -> Config:
    """BitsAndBytesConfig's default is float32, whatever the weights are."""
    if fields.get("format") not in ("nf4", "fp4"):
        return {}
    precision = str(fields["precision"])
    autocast = parse_dtype(precision.removesuffix("-mixed")).label if precision.endswith("-mixed") else fields["dtype"]
    return {"quantization.bnb_4bit_compute_dtype": fields.get("format.compute_dtype", autocast)}


def _write_storage(fields: Fields) -> Config:
    sharded = fields.get("format") in ("nf4", "fp4") and fields.get("layout") == "fsdp"
    return {"quantization.bnb_4bit_quant_storage": fields["dtype"]} if sharded else {}


def _read_storage(_: Config) -> Fields:
    return {}


@final
class HfScript(Trainer):
    name = "hf_script"
    title = "a transformers + PEFT script"
    homepage = "https://huggingface.co/docs/peft"
    requirements = ("transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0")
    signature = frozenset({"settings", "model.name", "data.batching", "data.seq_len", "arguments.optim", "prepare"})
    dataset_keys = ("data.dataset",)
    beside = ("gpus", "nodes", "layout", "offload")
    proved = (
        "On the CPU with a tiny random model: every method of peftplan in one process, seven of them on nf4 too; "
        "LoRA, DoRA, IA3 and full over two processes with DDP or FSDP2, full with ZeRO-2 and the optimizer "
        "offloaded; bitsandbytes' optimizers. Trained parameters and, in one process, optimizer states are "
        "peftplan's numbers exactly. Not run: flash attention, Liger, more nodes. int8 with DoRA fails in PEFT on "
        "the CPU."
    )
    harmless = frozenset({f"arguments.{pattern}" for pattern in _huggingface.HARMLESS} | {"data.dataset"})
    rules = (
        same("model.name", "model"),
        custom(
            ("method", "settings", "settings.*"),
            ("method", "rank", "target_modules", "method.*"),
            read=_read_method,
            write=_write_method,
        ),
        custom(
            ("variant",), ("variant",),
            read=lambda config: {"variant": config["variant"]} if config.get("variant") else {},
            write=lambda fields: {"variant": fields.get("variant")},
        ),
        under("model.", _huggingface.weights()),
        under("model.", _huggingface.attention()),
        under("quantization.", _huggingface.bits_and_bytes()),
        custom(
            ("quantization.bnb_4bit_compute_dtype",), ("format.compute_dtype",),
            read=lambda config: {"format.compute_dtype": config["quantization.bnb_4bit_compute_dtype"]}
            if config.get("quantization.bnb_4bit_compute_dtype") else {},
            write=_write_compute,
        ),
        custom(
            ("quantization.bnb_4bit_quant_storage",),
            (),
            read=_read_storage,
            write=_write_storage,
            stand_ins=lambda config: keeps(config, "quantization.bnb_4bit_quant_storage"),
        ),
        custom(
            ("prepare",), ("format.prepare",),
            read=lambda config: {"format.prepare": False} if config.get("prepare") is False else {},
            write=lambda fields: {"prepare": fields.get("format.prepare", True)},
        ),
        custom(
            ("adapter_dtype",), ("adapter_dtype",),
            read=lambda config: {"adapter_dtype": config.get("adapter_dtype") or "auto"},
            write=lambda fields: {"adapter_dtype": _dtype(fields.get("adapter_dtype", "auto"))},
        ),
        same("data.seq_len", "seq_len"),
        words("data.batching", "batching", {name: name for name in ("padded", "packed", "exact")}),
        *(under("arguments.", rule) for rule in (
            *_huggingface.batches(),
            _huggingface.mixed_precision(),
            *_recompute.checkpointing(default=False),
            _optimizers.optimizer(),
            *_huggingface.compiled_and_fused(),
            _huggingface.layout(),
        )),
        always("loop.outputs_until", "loss"),
        custom(
            ("arguments.use_cache",),
            ("model.use_cache",),
            read=lambda config: {"model.use_cache": bool(config.get("arguments.use_cache"))},
            write=lambda fields: {"arguments.use_cache": fields.get("model.use_cache", False)},
        ),
    )  # fmt: skip

    def refuse(self, fields: Fields) -> None:
        _huggingface.refuse_packed_training(fields)

    def run_keys(self, run: Run) -> Config:
        return {
            "data.dataset": run.dataset,
            "arguments.output_dir": run.output_dir,
            **({"arguments.num_train_epochs": 1} if run.max_steps is None else {"arguments.max_steps": run.max_steps}),
            "arguments.learning_rate": run.learning_rate,
            "arguments.seed": run.seed,
            **({"arguments.use_cpu": True} if run.on_cpu else {}),
        }

    def folder(self, job: Job, run: Run) -> Folder:
        files = {"train.py": script(self.config(job, run))}
        if not _accelerate.spreads(job):
            return Folder(files=files, command="accelerate launch --num_processes 1 train.py", program="train.py")
        files |= _accelerate.files(job)
        return Folder(files=files, command=f"accelerate launch {_accelerate.options(job)} train.py", program="train.py")


def script(config: Mapping[str, Any]) -> str:
    """train.py with this literal in its one place."""
    text = resources.files(__package__).joinpath("scripts/hf_script.txt").read_text("utf-8")
    ordered = {key: config[key] for key in (*_ORDER, *config) if key in config}
    return text.replace("CONFIG = None", f"CONFIG = {literal(ordered)}", 1)


def literal(value: Any, depth: int = 0) -> str:
    """Python's notation, one key of a mapping a line."""
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value) if isinstance(value, str) else repr(value)
    inside = "".join(f"{'    ' * (depth + 1)}{key!r}: {literal(each, depth + 1)},\n" for key, each in value.items())
    return "{\n" + inside + "    " * depth + "}"


def _dtype(name: str) -> str:
    return name if name == "auto" else parse_dtype(name).label


TRAINER = HfScript
