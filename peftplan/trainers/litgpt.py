"""LitGPT: `litgpt finetune_lora --config FILE` or `finetune_full`, a YAML read by jsonargparse.

Reads: the YAML of both; LoRA where a key of LoRA's is there. Writes: the YAML and the command.
Not expressed: DoRA and other variants of LoRA, adapters that take only some of the MLP, autocast over weights of half
precision, packing, checkpointing of activations on one GPU. Quantized bases train on one GPU, with a paged optimizer.
Defaults: bf16 autocast over float32 weights, micro-batch 1 of a global batch of 16, rank 8 with 5 % dropout on queries
and values, sequences as long as the data's longest (0.5.13: finetune/lora.py and full.py setup, args.py).
Does: shards with FSDP2 (LoRA) or FSDP (full) and checkpoints every block as soon as there are several GPUs; holds
adapters in the weights' dtype; pads without a mask; computes the head and the loss in chunks of 128 tokens; with
`quantize` takes bitsandbytes' PagedAdamW whatever AdamW is asked for (utils.py, instantiate_bnb_optimizer); holds
embeddings and head apart where the model ties them.
LitGPT has its own models. Priced are transformers' and PEFT's: the loss over chunks is priced as one over all logits,
and a quantized base's head as not quantized, which LitGPT quantizes too; both err high.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import yaml

from peftplan import methods
from peftplan.errors import RequestError
from peftplan.job import Job
from peftplan.trainers.base import TORCHRUN, Folder, Run, Trainer
from peftplan.trainers.rules import Config, Fields, Inexpressible, StandIn, always, custom, does
from peftplan.units import parse_dtype

_PLACES = {
    "lora_query": ("q_proj",),
    "lora_key": ("k_proj",),
    "lora_value": ("v_proj",),
    "lora_projection": ("o_proj",),
    "lora_mlp": ("gate_proj", "up_proj", "down_proj"),
    "lora_head": ("lm_head",),
}
_ON_BY_DEFAULT = ("lora_query", "lora_value")
_LORA_KEYS = ("lora_r", "lora_alpha", "lora_dropout", *_PLACES, "quantize")
_ALL = tuple(name for key, names in _PLACES.items() if key != "lora_head" for name in names)
_PRECISIONS: dict[str, tuple[str, str]] = {
    "bf16-mixed": ("float32", "bf16-mixed"),
    "16-mixed": ("float32", "fp16-mixed"),
    "bf16-true": ("bfloat16", "bf16"),
    "16-true": ("float16", "fp16"),
    "32-true": ("float32", "fp32"),
}
"""Fabric's word: (dtype of the weights, precision)."""
DEFAULT_PRECISION = "bf16-mixed"
"""utils.py, get_default_supported_precision: fp16 on cards that have no bf16."""
_QUANTIZED: dict[str, dict[str, Any]] = {
    "bnb.nf4": {"format": "nf4", "format.double_quant": False},
    "bnb.nf4-dq": {"format": "nf4", "format.double_quant": True},
    "bnb.fp4": {"format": "fp4", "format.double_quant": False},
    "bnb.fp4-dq": {"format": "fp4", "format.double_quant": True},
    "bnb.int8-training": {"format": "int8"},
}
_PAGED: dict[str, Any] = {"optimizer": "adamw_8bit", "optimizer.is_paged": True, "optimizer.optim_bits": 32}
_ADAMW = ("AdamW", "torch.optim.AdamW")
_OTHER_OPTIMIZER = StandIn(value="adamw", errs="either way", because="AdamW holds two states of a weight's size")
_LONGEST = StandIn(value=1024, errs="either way", because="sequences are as long as the longest of the data")
_CHUNKED = "priced as one loss over all logits, which errs high: LitGPT takes 128 tokens at a time"


def _is_lora(config: Config) -> bool:
    return any(config.get(key) is not None for key in _LORA_KEYS)


def _read_method(config: Config) -> Fields:
    if not _is_lora(config):
        return {"method": "full"}
    on = [key for key in _PLACES if config.get(key, key in _ON_BY_DEFAULT)]
    fields: dict[str, Any] = {"method": "lora", "target_modules": tuple(name for key in on for name in _PLACES[key])}
    if config.get("lora_alpha") is not None:
        fields["method.lora_alpha"] = config["lora_alpha"]
    return {**fields, "rank": config.get("lora_r", 8), "method.lora_dropout": config.get("lora_dropout", 0.05)}


def _write_method(fields: Fields) -> Config:
    if fields["method"] == "full":
        return {}
    if fields["method"] != "lora":
        raise Inexpressible("method", fields["method"])
    return {
        "lora_r": fields["rank"],
        "lora_alpha": fields.get("method.lora_alpha", 8),
        "lora_dropout": fields.get("method.lora_dropout", 0.0),
        **_write_targets(fields["target_modules"]),
    }


def _write_targets(asked: Any) -> dict[str, bool]:
    names = set(_ALL if asked == "all-linear" else asked)
    found = {key: names >= set(here) for key, here in _PLACES.items()}
    meant = {name for key, on in found.items() if on for name in _PLACES[key]}
    if (isinstance(asked, str) and asked != "all-linear") or meant != names:
        raise Inexpressible("target_modules", asked)
    return found


def _read_precision(config: Config) -> Fields:
    word = config.get("precision") or DEFAULT_PRECISION
    if word not in _PRECISIONS:
        raise RequestError(f"precision: {word!r} is not read; known: {', '.join(_PRECISIONS)}")
    dtype, precision = _PRECISIONS[word]
    adapter = {"adapter_dtype": dtype} if _is_lora(config) else {}
    return {"dtype": dtype, "precision": precision, **adapter}


def _write_precision(fields: Fields) -> Config:
    dtype = parse_dtype(fields["dtype"])
    adapter = fields.get("adapter_dtype")
    if adapter is not None and methods.get(fields["method"]).trains != "base" and parse_dtype(adapter) is not dtype:
        raise Inexpressible("adapter_dtype", adapter)
    for word, meant in _PRECISIONS.items():
        if meant == (dtype.label, fields["precision"]):
            return {"precision": word}
    raise Inexpressible("precision", f"{fields['precision']} of {dtype.label} weights")


def _read_format(config: Config) -> Fields:
    word = config.get("quantize")
    if word is None:
        return {}
    if word not in _QUANTIZED:
        raise RequestError(f"quantize: {word!r} is not read; known: {', '.join(_QUANTIZED)}")
    if "mixed" in (config.get("precision") or DEFAULT_PRECISION):
        raise RequestError("quantize needs a precision that is not mixed, such as bf16-true (LitGPT's own rule)")
    return _QUANTIZED[word]


def _write_format(fields: Fields) -> Config:
    packed = fields.get("format")
    if packed is None:
        return {"quantize": None} if fields["method"] == "lora" else {}
    several = fields.get("gpus", 1) * fields.get("nodes", 1) > 1
    wanted = {
        "format": packed,
        **({} if packed == "int8" else {"format.double_quant": bool(fields.get("format.double_quant"))}),
    }
    word = next((word for word, meant in _QUANTIZED.items() if meant == wanted), None)
    if word is None or several or fields["method"] != "lora" or str(fields["precision"]).endswith("-mixed"):
        raise Inexpressible("format", f"{packed}" + (" on several GPUs" if several else ""))
    return {"quantize": word}


def _read_optimizer(config: Config) -> Fields:
    return _PAGED if config.get("quantize") else {"optimizer": "adamw", **_fused(config)}


def _fused(config: Config) -> Fields:
    return {"optimizer.impl": "fused"} if config.get("optimizer.init_args.fused") else {}


def _write_optimizer(fields: Fields) -> Config:
    own = {key: value for key, value in fields.items() if key.partition(".")[0] == "optimizer"}
    impl = own.pop("optimizer.impl", "auto")
    expected = _PAGED if fields.get("format") else {"optimizer": "adamw"}
    if own != expected or impl == "for-loop":
        raise Inexpressible("optimizer", " ".join(f"{key}={value}" for key, value in own.items()))
    fused = {"optimizer.init_args.fused": True} if impl == "fused" else {}
    return {"optimizer.class_path": "torch.optim.AdamW", **fused}


def _name_of_optimizer(config: Config) -> tuple[str, Any]:
    key = "optimizer" if "optimizer" in config else "optimizer.class_path"
    return key, config.get(key, "AdamW")


def _other_optimizer(config: Config) -> Mapping[str, str]:
    key, name = _name_of_optimizer(config)
    return {} if name in _ADAMW or config.get("quantize") else {key: _OTHER_OPTIMIZER.why("optimizer")}


def _count(config: Config, key: str) -> int:
    value = config.get(key, 1)
    return value if isinstance(value, int) and value > 0 else 1


def _read_batch(config: Config) -> Fields:
    micro, whole = config.get("train.micro_batch_size", 1), config.get("train.global_batch_size", 16)
    gpus, nodes = _count(config, "devices"), _count(config, "num_nodes")
    steps = whole // (gpus * nodes) // micro
    if steps < 1:
        raise RequestError(f"train.global_batch_size: {whole} is less than one micro-batch of {micro} on each GPU")
    spread = {"layout": "fsdp"} if gpus * nodes > 1 else {}
    return {"micro_batch": micro, "grad_accum": steps, "gpus": gpus, "nodes": nodes, **spread}


def _write_batch(fields: Fields) -> Config:
    gpus, nodes = fields.get("gpus", 1), fields.get("nodes", 1)
    if fields.get("layout", "fsdp") != "fsdp":
        raise Inexpressible("layout", fields["layout"])
    whole = fields["micro_batch"] * fields["grad_accum"] * gpus * nodes
    sizes = {"train.micro_batch_size": fields["micro_batch"], "train.global_batch_size": whole}
    return {**sizes, "devices": gpus, "num_nodes": nodes}


def _any_number(config: Config) -> Mapping[str, str]:
    if isinstance(config.get("devices", 1), int) and config.get("devices", 1) > 0:
        return {}
    return {"devices": "as many GPUs as the machine has; priced as one, which errs high where there are more"}


def _several(config: Config) -> bool:
    return _count(config, "devices") * _count(config, "num_nodes") > 1


def _read_recompute(config: Config) -> Fields:
    return {"recompute": "full" if _several(config) else "none"}


def _write_recompute(fields: Fields) -> Config:
    does_it = fields.get("gpus", 1) * fields.get("nodes", 1) > 1
    if fields["recompute"] != ("full" if does_it else "none"):
        raise Inexpressible("recompute", fields["recompute"])
    return {}


def _read_model(config: Config) -> Fields:
    path = config.get("checkpoint_dir")
    if not isinstance(path, str):
        raise RequestError("checkpoint_dir: name the model, such as meta-llama/Llama-3.1-8B")
    return {"model": path.removeprefix("checkpoints/")}


def _longest(config: Config) -> Mapping[str, str]:
    return {} if config.get("train.max_seq_length") else {"train.max_seq_length": _LONGEST.why("seq_len")}


def _batching(fields: Fields) -> Config:
    if fields["batching"] == "packed":
        raise Inexpressible("batching", "packed")
    return {}


@final
class LitGpt(Trainer):
    name = "litgpt"
    title = "LitGPT"
    homepage = "https://github.com/Lightning-AI/litgpt"
    requirements = ("litgpt==0.5.13", "requests>=2")
    signature = frozenset({
        "checkpoint_dir", "train.micro_batch_size", "train.global_batch_size", "train.max_seq_length", "lora_query",
        "lora_value", "lora_head", "data.class_path", "eval.interval", "optimizer.class_path",
    })  # fmt: skip
    dataset_keys = ("data",)
    proved = (
        "What is written passes its own parser, which refuses unknown keys. full and LoRA trained three steps of a tiny"
        " Llama on the CPU with `litgpt finetune_*`; trained counts as predicted, the adapter saved. Quantized bases"
        " need CUDA there, and several GPUs did not run."
    )
    harmless = frozenset({
        "out_dir", "data.*", "data", "train.*", "eval.*", "log.*", "logger_name", "seed", "access_token", "resume",
        "optimizer.init_args.*",
    })  # fmt: skip
    rules = (
        custom(
            ("checkpoint_dir",), ("model",), read=_read_model, write=lambda fields: {"checkpoint_dir": fields["model"]}
        ),
        custom(
            tuple(key for key in _LORA_KEYS if key != "quantize"),
            ("method", "rank", "target_modules", "method.lora_alpha", "method.lora_dropout", "method.bias"),
            read=_read_method, write=_write_method,
        ),
        custom(("precision",), ("dtype", "precision", "adapter_dtype"), read=_read_precision, write=_write_precision),
        custom(("quantize",), ("format", "format.double_quant"), read=_read_format, write=_write_format),
        does("format.prepare", False, when=lambda config: bool(config.get("quantize"))),
        custom(
            ("train.micro_batch_size", "train.global_batch_size", "devices", "num_nodes"),
            ("micro_batch", "grad_accum", "gpus", "nodes", "layout"),
            read=_read_batch, write=_write_batch, stand_ins=_any_number,
        ),
        custom((), ("recompute",), read=_read_recompute, write=_write_recompute),
        custom(
            ("train.max_seq_length",), ("seq_len",),
            read=lambda c: {"seq_len": c["train.max_seq_length"]} if c.get("train.max_seq_length") else {},
            write=lambda fields: {"train.max_seq_length": fields["seq_len"]},
            defaults={"seq_len": 1024}, stand_ins=_longest,
        ),
        custom((), ("batching",), read=lambda _: {"batching": "exact"}, write=_batching),
        custom(
            ("optimizer", "optimizer.class_path", "optimizer.init_args.fused"), ("optimizer", "optimizer.*"),
            read=_read_optimizer, write=_write_optimizer, stand_ins=_other_optimizer,
        ),
        custom((), (), read=lambda _: {}, write=lambda _: {}, stand_ins=lambda _: {"loss": _CHUNKED}),
        does("attention", "sdpa", when=lambda _: True),
        always("loop.outputs_until", "loss"),
        always("model.use_cache", False),
        custom(
            ("train.tie_embeddings",), (), read=lambda _: {}, write=lambda _: {},
            defaults=lambda config: {} if config.get("train.tie_embeddings") else {"model.tie_word_embeddings": False},
        ),
    )  # fmt: skip

    def settled(self, full: Job, *, asked: Job) -> Job:
        """`full`, with LitGPT's optimizer for quantized bases and its checkpointing where the job leaves them open."""
        update: dict[str, Any] = {}
        if asked.optimizer is None and full.optimizer == "adamw" and full.format in ("nf4", "fp4", "int8"):
            update["optimizer"] = "paged_adamw_32bit"
        if asked.recompute is None:
            update["recompute"] = "full" if full.gpus * full.nodes > 1 else "none"
        return full.model_copy(update=update)

    def run_keys(self, run: Run) -> Config:
        return {
            "out_dir": run.output_dir,
            **_data(run),
            "train.epochs": 1,
            "train.max_steps": run.max_steps,
            "train.lr_warmup_steps": 10 if run.max_steps is None else 1,
            "logger_name": "csv",
            "seed": run.seed,
            "optimizer.init_args.lr": run.learning_rate,
        }

    def folder(self, job: Job, run: Run) -> Folder:
        config = self.config(job, run)
        recipe = "finetune_lora" if "lora_r" in config else "finetune_full"
        alone = job.gpus * job.nodes == 1
        program = f"-m litgpt {recipe} --config litgpt.yaml"
        command = f"litgpt {recipe} --config litgpt.yaml" if alone else f"{TORCHRUN} {program}"
        files = {"litgpt.yaml": yaml.safe_dump(config, sort_keys=False)}
        return Folder(files=files, command=command, program=program)


def _data(run: Run) -> Config:
    """Rows of instruction, input and output from a file; LitGPT downloads no other dataset by name."""
    return {
        "data.class_path": "litgpt.data.JSON",
        "data.init_args.json_path": run.dataset,
        "data.init_args.val_split_fraction": 0.1,
        "data.init_args.mask_prompt": False,
    }


TRAINER = LitGpt
