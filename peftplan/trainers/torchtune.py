"""torchtune: `tune run RECIPE --config FILE`, a YAML of components.

Reads: the YAML of the fine-tuning recipes: full and LoRA, on one GPU or several.
Writes: the YAML, what downloads the checkpoint, and the command; with several GPUs the recipe that shards (FSDP2).
Not expressed: fp16, autocast, int8, adapters of another dtype than the model, attention other than SDPA, models that
torchtune has no builder for. The number of GPUs is not in the file but in the command.
Defaults: no checkpointing of activations, LoRA of rank 8 with alpha 16 (0.6.1: recipes/*.py, models/*/_model_builders).
Does: holds adapters in the model's dtype; pads without a mask, so that attention stays causal; quantizes with torchao's
NF4, double quantization included, and leaves embeddings, norms and head in the model's dtype.
torchtune has its own models. Priced are transformers' and PEFT's, with torchtune's loss over chunks of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import yaml

from peftplan import optimizers
from peftplan.errors import RequestError
from peftplan.graph.chunked_loss import PIECES
from peftplan.job import Job
from peftplan.trainers import _torchtune
from peftplan.trainers.base import Folder, Run, Trainer
from peftplan.trainers.rules import (
    Config,
    Fields,
    Inexpressible,
    StandIn,
    always,
    covers,
    custom,
    does,
    same,
    unpriced,
    words,
)
from peftplan.units import parse_dtype

_MODELS = "torchtune.models."
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")
_ALL = (*_ATTENTION.values(), *_MLP)
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "torch.optim.AdamW": {"optimizer": "adamw"},
    "bitsandbytes.optim.AdamW8bit": {"optimizer": "adamw_8bit"},
    "bitsandbytes.optim.PagedAdamW8bit": {"optimizer": "adamw_8bit", "optimizer.is_paged": True},
    "bitsandbytes.optim.PagedAdamW": {
        "optimizer": "adamw_8bit",
        "optimizer.is_paged": True,
        "optimizer.optim_bits": 32,
    },
    "torch.optim.SGD": {"optimizer": "sgd"},
    "torch.optim.RMSprop": {"optimizer": "rmsprop"},
    "torch.optim.Adagrad": {"optimizer": "adagrad"},
    "torch.optim.Adafactor": {"optimizer": "adafactor_torch"},
    "torchao.optim.AdamW8bit": {"optimizer": "adamw_low_bit"},
    "torchao.optim.AdamW4bit": {"optimizer": "adamw_low_bit", "optimizer.bits": 4, "optimizer.block_size": 128},
    "torchao.optim.AdamWFp8": {"optimizer": "adamw_low_bit", "optimizer.bits": "fp8"},
}
_FUSED = ("torch.optim.AdamW", "torch.optim.SGD")
_ARGUMENTS = ("momentum", "nesterov", "centered")
"""Of torch's optimizers, what moves memory (weight decay is not passed on)."""
_OTHER_OPTIMIZER = StandIn(value="adamw", errs="either way", because="AdamW holds two states of a weight's size")
_CHUNKED = "torchtune.modules.loss.CEWithChunkedOutputLoss"
_WHOLE = StandIn(errs="either way", because="the fp32 logits are not kept beside those of the model's dtype")
_DISTRIBUTED = (
    "fsdp_cpu_offload", "fsdp.cpu_offload", "fsdp_reshard_after_forward", "custom_sharded_layers",
    "tensor_parallel_dim", "tensor_parallel_plan._component_",
)  # fmt: skip
_WHERE = (
    "checkpointer._component_", "checkpointer.checkpoint_*", "checkpointer.model_type",
    "checkpointer.recipe_checkpoint",
    "tokenizer._component_", "tokenizer.path", "tokenizer.*_file", "tokenizer.*_path",
)  # fmt: skip
DEFAULT_ALPHA = 16


def _built(config: Config) -> tuple[_torchtune.Built, str]:
    """The model and which of its builders: "", "lora" or "qlora"."""
    path = str(config.get("model._component_"))
    package, _, function = path.removeprefix(_MODELS).rpartition(".")
    adapted, _, rest = function.partition("_")
    kind = adapted if adapted in ("lora", "qlora") else ""
    found = _torchtune.by_builder(f"{package}.{rest if kind else function}")
    if not path.startswith(_MODELS) or found is None:
        raise RequestError(f"model._component_: {path} is not a model of torchtune's that peftplan reads")
    return found, kind


def _read_model(config: Config) -> Fields:
    built, kind = _built(config)
    fields: dict[str, Any] = {"model": _torchtune.model_in(config.get("checkpointer.checkpoint_dir"), built)}
    if not kind:
        return {**fields, "method": "full"}
    if kind == "qlora" or config.get("model.quantize_base"):
        fields |= {"format": "nf4", "format.double_quant": True, "format.prepare": False}
    if config.get("model.use_dora"):
        fields["method.use_dora"] = True
    return {**fields, "method": "lora", "target_modules": _targets(config)}


def _where(config: Config) -> Mapping[str, str]:
    """A config's own paths are kept as long as they name the same model."""
    return {key: "" for key in config if covers(_WHERE, key)}


def _targets(config: Config) -> tuple[str, ...]:
    names = config.get("model.lora_attn_modules") or []
    if unknown := [name for name in names if name not in _ATTENTION]:
        raise RequestError(f"model.lora_attn_modules: {unknown[0]!r} is not one of {', '.join(_ATTENTION)}")
    attention = tuple(_ATTENTION[name] for name in names)
    mlp = _MLP if config.get("model.apply_lora_to_mlp") else ()
    return (*attention, *mlp, *(("lm_head",) if config.get("model.apply_lora_to_output") else ()))


def _write_model(fields: Fields) -> Config:
    built = _torchtune.by_model(fields["model"])
    if built is None:
        raise Inexpressible("model", fields["model"])
    files = _torchtune.checkpoint(fields["model"], built)
    if fields["method"] == "full":
        return {"model._component_": f"{_MODELS}{built.builder}", **files}
    if fields["method"] != "lora":
        raise Inexpressible("method", fields["method"])
    package, _, function = built.builder.partition(".")
    own = {"model.quantize_base": _is_nf4(fields)}
    if fields.get("method.use_dora"):
        if built.builder in _torchtune.WITHOUT_DORA:
            raise Inexpressible("method.use_dora", f"True for {fields['model']}")
        own["model.use_dora"] = True
    return {"model._component_": f"{_MODELS}{package}.lora_{function}", **own, **_write_targets(fields), **files}


def _is_nf4(fields: Fields) -> bool:
    packed = fields.get("format")
    if packed not in (None, "nf4"):
        raise Inexpressible("format", packed)
    if packed and not fields.get("format.double_quant"):
        raise Inexpressible("format.double_quant", False)
    return packed is not None


def _write_targets(fields: Fields) -> Config:
    asked = fields["target_modules"]
    names = _ALL if asked == "all-linear" else asked
    mlp = [name for name in _MLP if name in names]
    if isinstance(names, str) or not set(names) <= {*_ALL, "lm_head"} or len(mlp) not in (0, len(_MLP)):
        raise Inexpressible("target_modules", asked)
    return {
        "model.lora_attn_modules": [own for own, name in _ATTENTION.items() if name in names],
        "model.apply_lora_to_mlp": bool(mlp),
        **({"model.apply_lora_to_output": True} if "lm_head" in names else {}),
    }


def _read_batching(config: Config) -> Fields:
    return {"batching": "packed" if config.get("dataset.packed") else "exact"}


def _write_batching(fields: Fields) -> Config:
    return {"dataset.packed": fields["batching"] == "packed"}


def _read_dtype(config: Config) -> Fields:
    word = config.get("dtype", "bf16")
    if word not in ("bf16", "fp32"):
        raise RequestError(f"dtype: {word!r} is not one of bf16, fp32, torchtune's own")
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[word]
    adapter = {} if _built(config)[1] == "" else {"adapter_dtype": dtype}
    return {"dtype": dtype, "precision": word, **adapter}


def _write_dtype(fields: Fields) -> Config:
    dtype = parse_dtype(fields["dtype"])
    if dtype.label not in ("bfloat16", "float32") or str(fields["precision"]).endswith("-mixed"):
        raise Inexpressible("precision", f"{fields['precision']} of {dtype.label} weights")
    adapter = fields.get("adapter_dtype")
    if adapter is not None and fields["method"] != "full" and parse_dtype(adapter) is not dtype:
        raise Inexpressible("adapter_dtype", adapter)
    return {"dtype": "bf16" if dtype.label == "bfloat16" else "fp32"}


def _read_optimizer(config: Config) -> Fields:
    name = str(config.get("optimizer._component_"))
    found = dict(_OPTIMIZERS.get(name, {"optimizer": _OTHER_OPTIMIZER.value}))
    known = optimizers.get(found["optimizer"]).__dataclass_fields__
    for key in _ARGUMENTS:
        if key in known and config.get(f"optimizer.{key}"):
            found[f"optimizer.{key}"] = config[f"optimizer.{key}"]
    if config.get("optimizer.fused") and name in _FUSED:
        found["optimizer.impl"] = "fused"
    return found | ({"optimizer.in_backward": True} if config.get("optimizer_in_bwd") else {})


def _write_optimizer(fields: Fields) -> Config:
    own = {key: value for key, value in fields.items() if key.partition(".")[0] == "optimizer"}
    rest = dict(own)
    impl, in_backward = rest.pop("optimizer.impl", "auto"), rest.pop("optimizer.in_backward", False)
    arguments = {key: rest.pop(key) for key in (f"optimizer.{name}" for name in _ARGUMENTS) if key in rest}
    name = next((name for name, meant in _OPTIMIZERS.items() if meant == rest), None)
    if name is None or impl == "for-loop":
        raise Inexpressible("optimizer", " ".join(f"{key}={value}" for key, value in own.items()))
    fused = {"optimizer.fused": impl == "fused"} if name in _FUSED else {}
    return {"optimizer._component_": name, **fused, **arguments, "optimizer_in_bwd": bool(in_backward)}


def _other_optimizer(config: Config) -> Mapping[str, str]:
    name = config.get("optimizer._component_")
    return {} if name in _OPTIMIZERS else {"optimizer._component_": _OTHER_OPTIMIZER.why("optimizer")}


def _read_layout(config: Config) -> Fields:
    """The recipes for several GPUs have keys that those for one do not know."""
    said = (config.get(key) for key in _DISTRIBUTED if not key.startswith("fsdp"))
    if not any(key.startswith("fsdp") for key in config) and all(value in (None, False, 1) for value in said):
        return {}
    offload = config.get("fsdp_cpu_offload") or config.get("fsdp.cpu_offload")
    return {"layout": "fsdp"} | ({"offload": "params+optimizer"} if offload else {})


def _write_layout(fields: Fields) -> Config:
    several = fields.get("gpus", 1) * fields.get("nodes", 1) > 1
    layout, offload = fields.get("layout", "fsdp" if several else None), fields.get("offload")
    if layout not in (None, "fsdp") or offload not in (None, "params+optimizer"):
        raise Inexpressible("layout", f"{layout}" + (f" with --offload {offload}" if offload else ""))
    return {} if layout is None else {"fsdp_cpu_offload": offload is not None}


def _tensor_parallel(config: Config) -> Mapping[str, str]:
    if config.get("tensor_parallel_dim", 1) == 1:
        return {}
    return {"tensor_parallel_dim": StandIn(value="fsdp", errs="either way").why("layout")}


def _in_pieces(config: Config) -> Fields:
    return {"loss.style": "chunked"} if config.get("loss._component_", _CHUNKED) == _CHUNKED else {}


def _other_loss(config: Config) -> Mapping[str, str]:
    if not _in_pieces(config):
        instead = "as transformers' loss over all logits"
        return {"loss._component_": _WHOLE.why().replace("as if it were off", instead)}
    if config.get("loss.num_output_chunks", PIECES) == PIECES:
        return {}
    return {"loss.num_output_chunks": f"priced as {PIECES} pieces; fewer hold more of the logits in fp32 at a time"}


def _is_quantized(config: Config) -> bool:
    return _built(config)[1] == "qlora" or bool(config.get("model.quantize_base"))


@final
class Torchtune(Trainer):
    name = "torchtune"
    title = "torchtune"
    homepage = "https://meta-pytorch.org/torchtune/"
    requirements = ("torchtune==0.6.1", "torchao==0.15.0")
    signature = frozenset({
        "model._component_", "tokenizer._component_", "checkpointer._component_", "loss._component_",
        "optimizer._component_", "dataset._component_", "enable_activation_checkpointing",
    })  # fmt: skip
    dataset_keys = ("dataset",)
    proved = (
        "Every model it builds, full, LoRA, DoRA and on NF4, is accepted by its own checks (config.validate), which"
        " know the arguments of components and no keys of the top level. full, LoRA, DoRA and LoRA on NF4 trained three"
        " steps of a tiny Llama on the CPU with `tune run`; trained counts as predicted, the adapter saved. Its recipes"
        " for several GPUs did not run."
    )
    beside = ("gpus", "nodes")
    harmless = frozenset({
        "output_dir", "tokenizer.*", "checkpointer.*", "resume_from_checkpoint", "save_adapter_weights_only",
        "dataset.*",
        "seed", "shuffle", "optimizer.*", "lr_scheduler.*", "epochs", "max_steps_per_epoch", "clip_grad_norm",
        "metric_logger.*", "log_*", "device", "profiler.*", "low_cpu_ram", "collate_fn", "cudnn_deterministic_mode",
        "enable_async_checkpointing", "batch_size_val", "run_val_every_n_steps", "loss.ignore_index",
        "tensor_parallel_plan._component_",
    })  # fmt: skip
    rules = (
        custom(
            ("model._component_", "model.lora_attn_modules", "model.apply_lora_to_mlp", "model.apply_lora_to_output",
             "model.use_dora", "model.quantize_base", *_WHERE),
            ("model", "method", "target_modules", "method.use_dora", "format", "format.double_quant"),
            read=_read_model,
            write=_write_model,
            stand_ins=_where,
        ),
        does("format.prepare", False, when=_is_quantized),
        custom(
            ("model.lora_rank",),
            ("rank",),
            read=lambda config: {"rank": config["model.lora_rank"]} if config.get("model.lora_rank") else {},
            write=lambda fields: {"model.lora_rank": fields["rank"]} if fields["method"] == "lora" else {},
            defaults=lambda config: {"rank": 8} if _built(config)[1] else {},
        ),
        custom(
            ("model.lora_alpha",),
            ("method.lora_alpha", "method.bias"),
            read=lambda c: {"method.lora_alpha": c["model.lora_alpha"]} if c.get("model.lora_alpha") else {},
            write=lambda fields: (
                {"model.lora_alpha": fields.get("method.lora_alpha", DEFAULT_ALPHA)}
                if fields["method"] == "lora" else {}
            ),
        ),
        same("model.lora_dropout", "method.lora_dropout"),
        same("batch_size", "micro_batch"),
        same("gradient_accumulation_steps", "grad_accum"),
        same("tokenizer.max_seq_len", "seq_len"),
        custom(("dataset.packed",), ("batching",), read=_read_batching, write=_write_batching),
        custom(("dtype",), ("dtype", "precision", "adapter_dtype"), read=_read_dtype, write=_write_dtype),
        words("enable_activation_checkpointing", "recompute", {True: "full", False: "none"}, default="none"),
        custom(
            ("enable_activation_offloading",), ("recompute.offload",),
            read=lambda config: {"recompute.offload": True} if config.get("enable_activation_offloading") else {},
            write=lambda fields: {"enable_activation_offloading": bool(fields.get("recompute.offload"))},
        ),
        custom(
            ("optimizer._component_", "optimizer.fused", "optimizer_in_bwd", *(f"optimizer.{a}" for a in _ARGUMENTS)),
            ("optimizer", "optimizer.*"),
            read=_read_optimizer, write=_write_optimizer, stand_ins=_other_optimizer,
        ),
        custom(
            ("loss._component_", "loss.num_output_chunks"), ("loss.style",), read=lambda _: {},
            write=lambda _: {"loss._component_": _CHUNKED}, defaults=_in_pieces, stand_ins=_other_loss,
        ),
        unpriced("compile", StandIn(errs="high", because="compiled graphs keep and make fewer tensors"), writes=False),
        custom(_DISTRIBUTED, ("layout", "offload"), read=_read_layout, write=_write_layout, stand_ins=_tensor_parallel),
        does("attention", "sdpa", when=lambda _: True),
        always("loop.outputs_until", "loss"),
        always("model.use_cache", False),
    )  # fmt: skip

    def settled(self, full: Job, *, asked: Job) -> Job:
        """`full`, in bf16 where the job leaves the precision open: torchtune knows no other half precision."""
        if asked.dtype is not None or asked.precision is not None:
            return full
        return full.model_copy(update={"dtype": "bfloat16", "precision": "bf16"})

    def run_keys(self, run: Run) -> Config:
        return {
            "output_dir": run.output_dir,
            "checkpointer.output_dir": run.output_dir,
            "resume_from_checkpoint": False,
            **_dataset(run),
            "seed": run.seed,
            "shuffle": True,
            "optimizer.lr": run.learning_rate,
            "lr_scheduler._component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "lr_scheduler.num_warmup_steps": 10,
            "epochs": 1,
            "max_steps_per_epoch": run.max_steps,
            "clip_grad_norm": None,
            "save_adapter_weights_only": True,
            "metric_logger._component_": "torchtune.training.metric_logging.DiskLogger",
            "metric_logger.log_dir": f"{run.output_dir}/logs",
            "log_every_n_steps": 1,
            "log_peak_memory_stats": True,
            "device": "cpu" if run.on_cpu else "cuda",
        }

    def folder(self, job: Job, run: Run) -> Folder:
        config = self.config(job, run)
        source = str(config["checkpointer"]["checkpoint_dir"])
        model = source.removeprefix("checkpoints/")
        files = {
            "tune.yaml": yaml.safe_dump(config, sort_keys=False),
            "download.sh": f"tune download {model} --output-dir {source} --ignore-patterns 'original/consolidated*'\n",
        }
        return Folder(files=files, command=_command(config, several=job.gpus * job.nodes > 1))


def _dataset(run: Run) -> Config:
    """Rows of messages from a file, or a Hub dataset of the alpaca columns."""
    if run.dataset is not None and run.dataset.endswith((".json", ".jsonl")):
        return {
            "dataset._component_": "torchtune.datasets.chat_dataset",
            "dataset.source": "json",
            "dataset.data_files": run.dataset,
            "dataset.split": "train",
            "dataset.conversation_column": "messages",
            "dataset.conversation_style": "openai",
        }
    return {"dataset._component_": "torchtune.datasets.alpaca_dataset", "dataset.source": run.dataset}


def _command(config: Mapping[str, Any], *, several: bool) -> str:
    """With several nodes `tune run` must be given a rendezvous endpoint, or every node trains on its own."""
    kind = "lora" if "lora_rank" in config["model"] else "full"
    if not several:
        return f"tune run {kind}_finetune_single_device --config tune.yaml"
    meeting = "--rdzv-id peftplan --rdzv-backend c10d --rdzv-endpoint $MASTER_ADDR:$MASTER_PORT"
    return (
        f"tune run --nnodes $NNODES --nproc-per-node $NPROC_PER_NODE {meeting}"
        f" {kind}_finetune_distributed --config tune.yaml"
    )


TRAINER = Torchtune
