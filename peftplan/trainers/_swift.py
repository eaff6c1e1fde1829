"""What ms-swift's keys mean where one key is not one field. Read from ms-swift 4.6.0, where it says."""

from __future__ import annotations

import math
from typing import Any

from peftplan import methods
from peftplan.errors import RequestError
from peftplan.trainers._shared import names, spread
from peftplan.trainers.rules import Config, Fields, Inexpressible, Kept

IA3_FEEDFORWARD = ".*mlp.*"
"""tuner_plugin/ia3.py: every linear layer, and by this pattern those of the feed-forward at their input."""
FLASH = ("flash_attn", "flash_attention_2", "flash_attention_3", "flash_attention_4")
ATTENTION = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flash_attention_2": "flash_attention_2",
    "flash_attn": "flash_attention_2",
    "flash_attention_3": "flash_attention_3",
}
_WRITTEN = ("lora", "vera", "fourierft", "boft")
_TARGETED = ("lora", "vera", "adalora", "boft", "fourierft", "oft")


def kind(config: Config) -> str:
    """`train_type` and `sft_type` are what older versions called it."""
    said = config.get("tuner_type") or config.get("train_type") or config.get("sft_type")
    return str(said or "lora")


def is_lora(config: Config) -> bool:
    return kind(config) == "lora"


def is_vera(config: Config) -> bool:
    return kind(config) == "vera"


def is_fourier(config: Config) -> bool:
    return kind(config) == "fourierft"


def is_boft(config: Config) -> bool:
    return kind(config) == "boft"


def is_lisa(config: Config) -> bool:
    return kind(config) == "full" and (config.get("lisa_activated_layers") or 0) > 0


def is_pro(config: Config) -> bool:
    return kind(config) == "llamapro"


# -- method -----------------------------------------------------------------------------------------------------------


def read_method(config: Config) -> Fields:
    """pipelines/train/tuner.py, prepare_adapter. A name without a method of peftplan's is said as it is."""
    found = kind(config)
    if is_lisa(config):
        return {"method": "lisa"}
    if found == "full":
        return _full(config)
    if found == "llamapro":
        return {"method": "llama_pro"}
    if found == "ia3":
        return {"method": "ia3", "target_modules": "all-linear", "method.feedforward_modules": IA3_FEEDFORWARD}
    if found == "longlora":
        raise RequestError("tuner_type: longlora does not run on current transformers; use lora")
    return {"method": found}


def _full(config: Config) -> Fields:
    """Frozen whole but for biases is BitFit (utils/transformers_utils.py: re.search)."""
    if config.get("freeze_parameters_ratio") != 1:
        return {"method": "full"}
    pattern = str(config.get("trainable_parameters_regex") or "").replace("\\", "")
    if config.get("trainable_parameters") or not pattern.rstrip("$").endswith("bias"):
        return {"method": "full"}
    inner = pattern.rstrip("$").removesuffix("bias").rstrip(".").removeprefix(".*").rstrip(".")
    if not inner:
        return {"method": "bitfit"}
    return {"method": "bitfit", "method.train": tuple(inner.strip("()").split("|"))}


def write_method(fields: Fields) -> Config:
    method = fields["method"]
    if method in ("full", "lisa"):
        return {"tuner_type": "full"}
    if method == "llama_pro":
        if not fields.get("method.expand", True) or fields.get("method.train"):
            raise Inexpressible("method", "llama_pro on an expanded model or with modules outside of the layers")
        return {"tuner_type": "llamapro"}
    if method == "bitfit":
        train = fields.get("method.train")
        pattern = rf"({'|'.join(train)})\.bias$" if train else r"\.bias$"
        return {"tuner_type": "full", "freeze_parameters_ratio": 1.0, "trainable_parameters_regex": pattern}
    if method == "ia3":
        said = (fields.get("target_modules"), fields.get("method.feedforward_modules"))
        if said != ("all-linear", IA3_FEEDFORWARD):
            raise Inexpressible("method", "ia3 on other modules than all linear ones")
        return {"tuner_type": "ia3"}
    if method not in _WRITTEN:
        raise Inexpressible("method", method)
    return {"tuner_type": method}


def method_stand_ins(config: Config) -> Kept:
    if kind(config) != "full" or read_method(config)["method"] == "bitfit":
        return {}
    why = "priced as if every weight trained; errs high by the others' gradients and states"
    partial = ("freeze_parameters_ratio", "freeze_parameters", "freeze_parameters_regex")
    beside = ("trainable_parameters", "trainable_parameters_regex")
    found: dict[str, str | None] = {key: why for key in partial if config.get(key)}
    return found | {key: None for key in beside if found and config.get(key)}


def read_targets(config: Config) -> Fields:
    if kind(config) not in _TARGETED:
        return {}
    if config.get("target_regex"):
        return {"target_modules": config["target_regex"]}
    wanted = names(config.get("target_modules") or "all-linear")
    return {"target_modules": "all-linear" if "all-linear" in wanted else wanted}


def targets_stand_ins(config: Config) -> Kept:
    wanted = names(config.get("target_modules"))
    more = [name for name in wanted if name != "all-linear"]
    if "all-linear" in wanted and more:
        return {"target_modules": f"all-linear is priced, without {', '.join(more)}; errs low"}
    if is_vera(config) and len(wanted) != 1:
        return {
            "target_modules": "where their shapes differ, only those of v_proj's are adapted; priced all, errs high"
        }
    return {}


def write_targets(fields: Fields) -> Config:
    wanted = fields.get("target_modules")
    if fields["method"] not in _WRITTEN:
        return {}
    if fields["method"] == "vera" and (isinstance(wanted, str) or len(wanted or ()) != 1):
        raise Inexpressible("target_modules", f"{wanted} for vera (modules of one shape only; name one)")
    if isinstance(wanted, str) and wanted != "all-linear":
        return {"target_regex": wanted}
    return {"target_modules": ["all-linear"] if wanted == "all-linear" else list(wanted or ())}


def read_start(config: Config) -> Fields:
    start = config.get("init_weights")
    if not is_lora(config) or start in (None, True, "true"):
        return {}
    return {"method.init_lora_weights": False if start == "false" else start}


def write_start(fields: Fields) -> Config:
    start = fields.get("method.init_lora_weights")
    return {} if start in (None, True) else {"init_weights": "false" if start is False else start}


# -- weights ----------------------------------------------------------------------------------------------------------


def read_format(config: Config) -> Fields:
    """arguments/base_args/quant_args.py; nothing is cast to fp32 around the packed layers."""
    how, bits = config.get("quant_method"), config.get("quant_bits")
    if not how:
        return {}
    if how != "bnb":
        return {"format": str(how)}
    if bits == 8:
        return {"format": "int8"}
    if bits != 4:
        raise RequestError(f"quant_bits: {bits}: bitsandbytes packs to 4 or 8 bits")
    found: dict[str, Any] = {"format": config.get("bnb_4bit_quant_type") or "nf4"}
    if config.get("bnb_4bit_use_double_quant", True):
        found["format.double_quant"] = True
    compute = config.get("bnb_4bit_compute_dtype")
    if compute is None and config.get("torch_dtype") in ("float16", "float32"):
        compute = "float32"
    return found | ({"format.compute_dtype": compute} if compute else {})


def is_packed(config: Config) -> bool:
    return read_format(config).get("format") in ("nf4", "fp4", "int8")


def write_format(fields: Fields) -> Config:
    name = fields.get("format")
    if name is None:
        return {}
    if methods.get(fields["method"]).trains == "base" or name not in ("nf4", "fp4", "int8"):
        raise Inexpressible("format", name)
    if name == "int8":
        return {"quant_method": "bnb", "quant_bits": 8}
    if fields.get("format.blocksize", 64) != 64:
        raise Inexpressible("format.blocksize", fields["format.blocksize"])
    return {
        "quant_method": "bnb",
        "quant_bits": 4,
        "bnb_4bit_quant_type": name,
        "bnb_4bit_use_double_quant": fields.get("format.double_quant", False),
        "bnb_4bit_compute_dtype": fields.get("format.compute_dtype") or _compute(fields),
    }


def _compute(fields: Fields) -> str:
    """What packed weights are computed in where the job leaves it open: autocast's dtype, or the weights' own."""
    mixed = {"bf16-mixed": "bfloat16", "fp16-mixed": "float16"}
    return mixed.get(fields["precision"], str(fields["dtype"]))


def read_precision(config: Config) -> Fields:
    """arguments/base_args/model_args.py, _init_mixed_precision: autocast by the dtype, fp16 for fp32 weights."""
    dtype = config.get("torch_dtype")
    stated = {key: config.get(key) for key in ("bf16", "fp16")}
    if dtype is None and stated == {"bf16": None, "fp16": None}:
        return {}
    dtype = dtype or "bfloat16"
    bf16 = stated["bf16"] if stated["bf16"] is not None else dtype == "bfloat16"
    fp16 = stated["fp16"] if stated["fp16"] is not None else dtype != "bfloat16"
    if bf16 or fp16:
        return {"dtype": dtype, "precision": "bf16-mixed" if bf16 else "fp16-mixed"}
    return {"dtype": dtype, "precision": {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "fp32")}


def write_precision(fields: Fields) -> Config:
    precision = fields["precision"]
    return {
        "torch_dtype": fields["dtype"],
        "bf16": precision == "bf16-mixed",
        "fp16": precision == "fp16-mixed",
    }


# -- activations ------------------------------------------------------------------------------------------------------


def read_batching(config: Config) -> Fields:
    """template/base.py, _data_collator: rows of different length are padded, a single one has none to pad."""
    if config.get("packing") or config.get("padding_free"):
        return {"batching": "packed"}
    return {"batching": "padded" if (config.get("per_device_train_batch_size") or 1) > 1 else "exact"}


def write_batching(fields: Fields) -> Config:
    batching, several = fields["batching"], fields["micro_batch"] > 1
    if batching == "packed":
        if fields["attention"] not in FLASH:
            raise Inexpressible("batching", f"packed with attention {fields['attention']}")
        return {"packing": True}
    if batching != ("padded" if several else "exact"):
        raise Inexpressible("batching", f"{batching} with {'several sequences' if several else 'one sequence'}")
    return {"packing": False, "padding_free": False}


def read_recompute(config: Config) -> Fields:
    """trainers/mixin.py, _fix_gradient_checkpointing: on, and reentrant in one process, unless told otherwise."""
    if config.get("gradient_checkpointing") is False:
        return {"recompute": "none"}
    reentrant = config.get("gradient_checkpointing_kwargs.use_reentrant")
    return {"recompute": "full"} | ({"recompute.use_reentrant": True} if reentrant is not False else {})


def write_layout(fields: Fields) -> Config:
    """arguments/sft_args.py, _init_fsdp: a preset by name."""
    keys = spread(fields)
    if fields.get("layout") != "fsdp":
        return keys
    if fields.get("offload"):
        raise Inexpressible("offload", f"{fields['offload']} with --layout fsdp")
    return {"fsdp": "fsdp2"}


def read_accumulation(config: Config) -> Fields:
    """trainers/arguments.py: up to 16 sequences a step, where nothing is said."""
    steps = config.get("gradient_accumulation_steps")
    if steps is not None:
        return {"grad_accum": steps}
    return {"grad_accum": max(1, math.ceil(16 / (config.get("per_device_train_batch_size") or 1)))}


def logits_stand_ins(config: Config) -> Kept:
    """trainers/mixin.py, get_use_logits_to_keep: on where nothing is said."""
    if config.get("use_logits_to_keep") is False:
        return {}
    return {"use_logits_to_keep": "only the answers' logits are made; priced with those of all tokens, errs high"}
