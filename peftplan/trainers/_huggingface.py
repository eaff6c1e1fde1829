"""Rules of every trainer built on transformers' TrainingArguments and from_pretrained.

Names and defaults are those of transformers 5.23.0 (training_args.py, class TrainingArguments and OptimizerNames;
modeling_utils.py, gradient_checkpointing_enable; utils/quantization_config.py, class BitsAndBytesConfig), read
2026-11-21; a trainer with older pins or defaults of its own says so in the rule's arguments.
"""

from __future__ import annotations

from collections.abc import Mapping

from peftplan.errors import RequestError
from peftplan.trainers import _deepspeed
from peftplan.trainers._liger import liger
from peftplan.trainers.rules import (
    Config,
    Fields,
    Inexpressible,
    Rule,
    StandIn,
    custom,
    nest,
    same,
    unpriced,
    words,
)

ATTENTION: dict[str, str | StandIn] = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flash_attention_2": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
    "kernels-community/flash-attn": "flash_attention_2",
    "kernels-community/flash-attn2": "flash_attention_2",
    "kernels-community/flash-attn3": "flash_attention_3",
    "kernels-community/vllm-flash-attn3": "flash_attention_3",
    "flash_attention_4": StandIn(value="flash_attention_3", errs="either way"),
    "flex_attention": StandIn(value="sdpa", errs="either way", because="it keeps what flash kernels keep"),
}
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
KERNELS = StandIn(errs="high", because="fused kernels keep less of the loss, the norms and the feed-forward")


def batches() -> tuple[Rule, ...]:
    """Micro-batch 8 and no accumulation where nothing is said (TrainingArguments)."""
    return (
        same("per_device_train_batch_size", "micro_batch", default=8),
        same("gradient_accumulation_steps", "grad_accum", default=1),
    )


def attention(key: str = "attn_implementation") -> Rule:
    """SDPA where nothing is said (modeling_utils.py)."""
    return words(key, "attention", ATTENTION, default="sdpa")


def weights(key: str = "dtype", *, default: str | None = None) -> Rule:
    """The dtype of from_pretrained; `auto` is the checkpoint's, and what transformers 5 does where nothing is said."""

    def read(config: Config) -> Fields:
        word = config.get(key)
        if word is None:
            return {}
        if word == "auto":
            return {"dtype": None}
        word = str(word).removeprefix("torch.")
        if word not in DTYPES:
            raise RequestError(f"{key}: {word!r} is not read; known: auto, {', '.join(DTYPES)}")
        return {"dtype": word}

    silent = {} if default is None else {"dtype": default}
    return custom((key,), ("dtype",), read=read, write=lambda fields: {key: fields["dtype"]}, defaults=silent)


def mixed_precision(*, bf16_by_default: bool = False) -> Rule:
    """`bf16` and `fp16` are autocast over whatever dtype the weights have."""

    def read(config: Config) -> Fields:
        if config.get("fp16"):
            return {"precision": "fp16-mixed"}
        if config.get("bf16") is None:
            return {}
        return {"precision": "bf16-mixed" if config["bf16"] else None}

    def write(fields: Fields) -> Config:
        precision = fields["precision"]
        return {"bf16": precision == "bf16-mixed", "fp16": precision == "fp16-mixed"}

    silent = {"precision": "bf16-mixed"} if bf16_by_default else {}
    return custom(("bf16", "fp16"), ("precision",), read=read, write=write, defaults=silent)


def bits_and_bytes(prefix: str = "", *, nested: str = "bnb_4bit_use_double_quant") -> Rule:
    """`load_in_4bit`, `load_in_8bit`, `bnb_4bit_quant_type` and double quantization, as BitsAndBytesConfig reads them.

    Says nothing of the compute dtype. nf4 where the type is not said: the trainers' default, not BitsAndBytesConfig's.
    """
    four, eight, kind, twice = (
        f"{prefix}{key}" for key in ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", nested)
    )

    def read(config: Config) -> Fields:
        if config.get(four) and config.get(eight):
            raise RequestError(f"{four} and {eight} contradict each other; give one of them")
        if config.get(eight):
            return {"format": "int8"}
        if not config.get(four):
            return {}
        return {"format": config.get(kind) or "nf4", "format.double_quant": bool(config.get(twice))}

    def write(fields: Fields) -> Config:
        packed = fields.get("format")
        if packed not in (None, "int8", "nf4", "fp4"):
            raise Inexpressible("format", packed)
        if packed in (None, "int8"):
            return {four: False, eight: packed == "int8"}
        return {four: True, eight: False, kind: packed, twice: bool(fields.get("format.double_quant"))}

    return custom((four, eight, kind, twice), ("format", "format.double_quant"), read=read, write=write)


def refuse_packed_training(fields: Fields) -> None:
    """Raises Inexpressible for methods that train the base's own weights where those are packed."""
    if "format" in fields and fields["method"] in ("full", "freeze", "bitfit"):
        raise Inexpressible("format", f"{fields['format']} with --method {fields['method']}")


def is_quantized(config: Config) -> bool:
    return bool(config.get("load_in_4bit") or config.get("load_in_8bit"))


LAYOUT_KEYS = ("deepspeed", "deepspeed.*", "fsdp", "fsdp_config", "fsdp_config.*", "fsdp_transformer_layer_cls_to_wrap")


def layout() -> Rule:
    """`deepspeed` (a file or its content) and `fsdp` with `fsdp_config`; how many GPUs there are, no config says."""
    return custom(LAYOUT_KEYS, ("layout", "offload"), read=_read_layout, write=lambda _: {}, stand_ins=_layout_instead)


def _read_layout(config: Config) -> Fields:
    inline = {key.partition(".")[2]: value for key, value in config.items() if key.startswith("deepspeed.")}
    if inline:
        fields, _ = _deepspeed.read(nest(inline))
        return {key: value for key, value in fields.items() if key in ("layout", "offload")}
    if config.get("deepspeed"):
        return {"layout": _deepspeed.stage_in_name(str(config["deepspeed"]))}
    asked = _fsdp_words(config)
    if not asked:
        return {}
    moves = "offload" in asked or config.get("fsdp_config.offload_params") in (True, "true")
    again = config.get("fsdp_config.activation_checkpointing") in (True, "true")
    return {
        "layout": "fsdp",
        **({"offload": "params+optimizer"} if moves else {}),
        **({"recompute": "full"} if again else {}),
    }


def _fsdp_words(config: Config) -> str:
    asked = config.get("fsdp")
    return " ".join(map(str, asked)) if isinstance(asked, list) else str(asked or "")


def _layout_instead(config: Config) -> Mapping[str, str]:
    if isinstance(config.get("deepspeed"), str):
        return {"deepspeed": _deepspeed.guessed(config["deepspeed"])}
    if "shard_grad_op" in _fsdp_words(config) or "hybrid" in _fsdp_words(config):
        return {
            "fsdp": StandIn(value="fsdp", errs="low", because="not everything is sharded over all GPUs").why("layout")
        }
    return {}


def compiled_and_fused(liger_always: Mapping[str, bool] | None = None) -> tuple[Rule, ...]:
    """Liger, with what the trainer always sets of it, and what changes the step's memory and is not modelled."""
    return (
        liger("use_liger_kernel", config="liger_kernel_config", always=liger_always),
        unpriced(
            "torch_compile", StandIn(errs="high", because="compiled graphs keep and make fewer tensors"), writes=False
        ),
        unpriced("neftune_noise_alpha", StandIn(errs="low", because="it adds noise of the embeddings' size")),
        unpriced("auto_find_batch_size", StandIn(errs="high", because="the batch shrinks until it fits"), writes=False),
        unpriced("torch_empty_cache_steps", StandIn(errs="high", because="the cache is given back between steps")),
    )


HARMLESS = frozenset({
    "output_dir", "overwrite_output_dir", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_*",
    "warmup_*", "weight_decay", "adam_beta*", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "tf32",
    "logging_*", "log_*", "ddp_backend", "include_num_input_tokens_seen", "disable_tqdm", "report_to",
    "run_name", "project", "trackio_*",
    "eval_*", "evaluation_strategy", "per_device_eval_batch_size", "do_*", "bf16_full_eval", "fp16_full_eval",
    "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "save_*", "enable_jit_checkpoint",
    "push_to_hub*", "hub_*", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "ignore_data_skip",
    "restore_callback_states_from_checkpoint", "full_determinism", "seed", "data_seed", "dataloader_*",
    "remove_unused_columns", "label_names", "group_by_length", "length_column_name", "train_sampling_strategy",
    "ddp_timeout", "ddp_find_unused_parameters", "debug", "skip_memory_metrics", "resume_from_checkpoint", "use_cpu",
    "average_tokens_across_devices", "accelerator_config*", "local_rank", "trust_remote_code", "model_revision",
})  # fmt: skip
"""Keys of TrainingArguments that say what to log, save, evaluate, schedule or load, none of which moves the peak of
a training step. (Evaluation runs without gradients; its own peak is not priced.)"""
