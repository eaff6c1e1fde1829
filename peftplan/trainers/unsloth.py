"""Unsloth: `unsloth train --config FILE`, a YAML of the sections data, training, lora and logging.

Reads: the YAML. Writes: the YAML and the command; one GPU.
Not expressed: other optimizers than 8-bit AdamW, other formats than NF4 with double quantization, fp16 and fp32,
packing with a choice of strategy, attention implementations. Several GPUs: the command line has no key for them.
Defaults: NF4 with double quantization, rank 64 on every projection, 2,048 tokens, batches of 2 accumulated 4 times,
Unsloth's own checkpointing (2026.10.9: unsloth_cli/config.py).
Does: bf16 autocast over a bf16 base, float32 adapters, 8-bit AdamW (studio/backend/core/training/trainer.py), no
prepare_model_for_kbit_training; its kernels (`--kernels unsloth`).
"""

from __future__ import annotations

from typing import Any, final

import yaml

from peftplan.job import Job
from peftplan.trainers.base import Folder, Run, Trainer
from peftplan.trainers.rules import Config, Fields, Inexpressible, always, custom, does, same, words
from peftplan.units import parse_dtype

_FLAGS = {"lora.use_rslora": "method.use_rslora", "lora.use_dora": "method.use_dora"}
_TARGETS = "lora.target_modules"
_PROJECTIONS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
_METHOD_KEYS = ("training.training_type", "lora.lora_r", "lora.lora_alpha", "lora.lora_dropout", _TARGETS, *_FLAGS)
_METHOD_FIELDS = (
    "method", "rank", "target_modules", "method.bias", "method.lora_alpha", "method.lora_dropout", *_FLAGS.values(),
)  # fmt: skip


def _read_method(config: Config) -> Fields:
    if config.get("training.training_type") == "full":
        return {"method": "full"}
    flags = {field: True for key, field in _FLAGS.items() if config.get(key)}
    targets = config.get(_TARGETS) or _PROJECTIONS
    names = targets.split(",") if isinstance(targets, str) else targets
    return {
        "method": "lora",
        "rank": config.get("lora.lora_r", 64),
        "target_modules": tuple(name.strip() for name in names if name.strip()),
        "method.lora_alpha": config.get("lora.lora_alpha", 16),
        "method.lora_dropout": config.get("lora.lora_dropout", 0.0),
        **flags,
    }


def _write_method(fields: Fields) -> Config:
    if fields["method"] == "full":
        return {"training.training_type": "full"}
    if fields["method"] != "lora":
        raise Inexpressible("method", fields["method"])
    return {
        "training.training_type": "lora",
        "lora.lora_r": fields["rank"],
        "lora.lora_alpha": fields.get("method.lora_alpha", 8),
        "lora.lora_dropout": fields.get("method.lora_dropout", 0.0),
        _TARGETS: _names(fields["target_modules"]),
        **{key: bool(fields.get(field)) for key, field in _FLAGS.items()},
    }


def _names(asked: Any) -> str:
    if isinstance(asked, str) and asked != "all-linear":
        raise Inexpressible("target_modules", asked)
    return _PROJECTIONS if asked == "all-linear" else ",".join(asked)


def _read_format(config: Config) -> Fields:
    four = config.get("training.load_in_4bit", True) and config.get("training.training_type") != "full"
    return {"format": "nf4", "format.double_quant": True} if four else {}


def _write_format(fields: Fields) -> Config:
    packed = fields.get("format")
    if packed not in (None, "nf4") or (packed and not fields.get("format.double_quant")):
        raise Inexpressible("format", f"{packed}" + ("" if packed != "nf4" else " without double quantization"))
    return {"training.load_in_4bit": packed is not None}


def _write_precision(fields: Fields) -> Config:
    dtype = parse_dtype(fields["dtype"]).label
    if (dtype, fields["precision"]) != ("bfloat16", "bf16-mixed"):
        raise Inexpressible("precision", f"{fields['precision']} of {dtype} weights")
    if fields.get("adapter_dtype", "float32") != "float32":
        raise Inexpressible("adapter_dtype", fields["adapter_dtype"])
    return {}


def _write_optimizer(fields: Fields) -> Config:
    own = {key: value for key, value in fields.items() if key.partition(".")[0] == "optimizer"}
    if own != {"optimizer": "adamw_8bit"}:
        raise Inexpressible("optimizer", " ".join(f"{key}={value}" for key, value in own.items()))
    return {}


def _read_batching(config: Config) -> Fields:
    packed = config.get("training.packing", False)
    return {"batching": "packed" if packed else "padded" if config.get("training.batch_size", 2) > 1 else "exact"}


def _write_batching(fields: Fields) -> Config:
    if fields["batching"] == "exact" and fields["micro_batch"] > 1:
        raise Inexpressible("batching", "exact with several sequences")
    return {"training.packing": fields["batching"] == "packed"}


@final
class Unsloth(Trainer):
    name = "unsloth"
    title = "Unsloth"
    homepage = "https://unsloth.ai/docs"
    requirements = ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9")
    signature = frozenset({
        "training.training_type", "training.max_seq_length", "training.load_in_4bit", "training.batch_size",
        "training.gradient_checkpointing", "lora.lora_r", "lora.target_modules", "data.format_type",
    })  # fmt: skip
    dataset_keys = ("data",)
    proved = (
        "What is written passes `unsloth train --dry-run`, which refuses unknown keys. Its command line needs parts"
        " that come with Unsloth Studio; LoRA trained three steps of a tiny Llama on the CPU through its Python"
        " interface with the written choices; trained count as predicted. Its fused kernels and its 8-bit AdamW need a"
        " GPU."
    )
    harmless = frozenset({
        "data.*", "data", "training.output_dir", "training.num_epochs", "training.learning_rate",
        "training.warmup_steps",
        "training.max_steps", "training.save_steps", "training.weight_decay", "training.random_seed",
        "training.train_on_completions", "lora.finetune_*", "lora.vision_all_linear", "lora.use_loftq", "logging.*",
        "training.lr_scheduler_type",
    })  # fmt: skip
    rules = (
        same("model", "model"),
        custom(
            _METHOD_KEYS,
            _METHOD_FIELDS,
            read=_read_method, write=_write_method,
        ),
        custom(
            ("training.load_in_4bit",), ("format", "format.double_quant"), read=_read_format, write=_write_format
        ),
        does("format.prepare", False, when=lambda config: "format" in _read_format(config)),
        custom(
            (), ("dtype", "precision", "adapter_dtype"),
            read=lambda _: {"dtype": "bfloat16", "precision": "bf16-mixed"}, write=_write_precision,
        ),
        same("training.max_seq_length", "seq_len", default=2048),
        same("training.batch_size", "micro_batch", default=2),
        same("training.gradient_accumulation_steps", "grad_accum", default=4),
        custom(("training.packing",), ("batching",), read=_read_batching, write=_write_batching),
        words(
            "training.gradient_checkpointing", "recompute",
            {"true": "full", "none": "none", True: "full", False: "none", "unsloth": "unsloth"}, default="full",
        ),
        custom(
            ("training.optim",), ("optimizer", "optimizer.*"),
            read=lambda _: {"optimizer": "adamw_8bit"}, write=_write_optimizer,
        ),
        does("kernels", "unsloth", when=lambda _: True),
        does("attention", "sdpa", when=lambda _: True),
        always("loop.outputs_until", "loss"),
        always("model.use_cache", False),
    )  # fmt: skip

    def settled(self, full: Job, *, asked: Job) -> Job:
        """`full`, with Unsloth's own optimizer, precision and kernels where the job leaves them open."""
        update: dict[str, Any] = {"kernels": "unsloth"} if asked.kernels is None else {}
        if asked.optimizer is None and full.optimizer == "adamw":
            update["optimizer"] = "adamw_8bit"
        if asked.precision is None and asked.dtype is None:
            update |= {"precision": "bf16-mixed", "dtype": "bfloat16"}
        return full.model_copy(update=update)

    def run_keys(self, run: Run) -> Config:
        is_file = run.dataset is not None and run.dataset.endswith((".json", ".jsonl"))
        return {
            **({"data.local_dataset": [run.dataset]} if is_file else {"data.dataset": run.dataset}),
            "data.format_type": "auto",
            "training.output_dir": run.output_dir,
            "training.num_epochs": 1,
            "training.max_steps": run.max_steps or 0,
            "training.learning_rate": run.learning_rate,
            "training.random_seed": run.seed,
        }

    def folder(self, job: Job, run: Run) -> Folder:
        text = yaml.safe_dump(self.config(job, run), sort_keys=False)
        return Folder(files={"unsloth.yaml": text}, command="unsloth train --config unsloth.yaml")


TRAINER = Unsloth
