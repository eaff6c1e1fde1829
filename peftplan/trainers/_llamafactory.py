"""What LLaMA-Factory's keys mean where one key is not one field. Read from llamafactory 0.9.5; where, stands at each
function."""

from __future__ import annotations

from typing import Any

from peftplan.errors import RequestError
from peftplan.trainers._shared import names
from peftplan.trainers.rules import Config, Fields, Inexpressible, Kept

EXTRA = {"norm": "model.norm", "lm_head": "lm_head", "embed_tokens": "model.embed_tokens"}
ATTENTION = {
    "sdpa": "sdpa",
    "auto": "sdpa",
    "disabled": "eager",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
}
"""extras/constants.py, AttentionFunction; auto leaves it to transformers, which takes sdpa."""

UPCAST = ("full", "freeze", "llama_pro")
"""Methods whose trained weights of the base become fp32 (model/adapter.py, init_adapter); BAdam's do not."""


def kind(config: Config) -> str:
    return config.get("finetuning_type") or "lora"


def is_lora(config: Config) -> bool:
    return kind(config) == "lora"


def is_badam(config: Config) -> bool:
    """train/trainer_utils.py, _create_badam_optimizer: by layers; it is not read for LoRA."""
    return bool(config.get("use_badam")) and kind(config) in ("full", "freeze") and not _by_ratio(config)


def unread_badam(config: Config) -> Kept:
    """Its keys where nothing reads them: written back as they stand."""
    return {} if is_badam(config) else dict.fromkeys((key for key in config if key.startswith("badam_")), None)


def _by_ratio(config: Config) -> bool:
    return config.get("badam_mode") == "ratio"


# -- method -----------------------------------------------------------------------------------------------------------


def read_method(config: Config) -> Fields:
    found = kind(config)
    if found not in ("lora", "oft", "freeze", "full"):
        raise RequestError(f"finetuning_type: {found!r} is not read; known: lora, oft, freeze, full")
    if is_badam(config):
        return {"method": "badam"}
    if found != "freeze":
        return {"method": found}
    extra = names(config.get("freeze_extra_modules"))
    layers = abs(config.get("freeze_trainable_layers") or 2)
    train = tuple(EXTRA.get(name, name) for name in extra)
    also = {"method.train": train} if train else {}
    if config.get("use_llama_pro"):
        return {"method": "llama_pro", "method.num_new_blocks": layers, "method.expand": False, **also}
    return {"method": "freeze", "method.layers": layers, **also}


def write_method(fields: Fields) -> Config:
    method = fields["method"]
    if method == "badam":
        return _write_badam(fields)
    if method not in ("lora", "oft", "freeze", "full", "llama_pro"):
        raise Inexpressible("method", method)
    if method not in ("freeze", "llama_pro"):
        return {"finetuning_type": method}
    spoken = {full: name for name, full in EXTRA.items()}
    extra = ",".join(spoken.get(name, name) for name in fields.get("method.train", ()))
    keys = {"finetuning_type": "freeze", "freeze_trainable_layers": _layers(fields), "freeze_trainable_modules": "all"}
    pro = {"use_llama_pro": True} if method == "llama_pro" else {}
    return keys | pro | ({"freeze_extra_modules": extra} if extra else {})


def _layers(fields: Fields) -> int:
    if fields["method"] == "llama_pro":
        if fields.get("method.expand", True):
            raise Inexpressible("method.expand", "true (it trains a model that was expanded before)")
        return int(fields.get("method.num_new_blocks", 8))
    layers = int(fields.get("method.layers", 2))
    if layers == 0:
        raise Inexpressible("method.layers", 0)
    return layers


def _write_badam(fields: Fields) -> Config:
    for block in ("method.include_embedding", "method.include_lm_head"):
        if fields.get(block):
            raise Inexpressible(block, True)
    return {"finetuning_type": "full", "use_badam": True}


def method_stand_ins(config: Config) -> Kept:
    """model/adapter.py, _setup_freeze_tuning: only trained weights become fp32. model_utils/checkpointing.py: only
    layers that train are checkpointed."""
    found: dict[str, str | None] = {}
    if config.get("use_badam") and _by_ratio(config):
        found["use_badam"] = "sparse gradients are not modelled; priced without BAdam, errs high"
    elif is_badam(config):
        if not config.get("disable_gradient_checkpointing"):
            found["use_badam"] = _ABOVE
        return found
    if kind(config) != "freeze":
        pro = "new blocks alone are adapted; priced as every layer, errs high"
        return found | ({"use_llama_pro": pro} if config.get("use_llama_pro") else {})
    if not config.get("pure_bf16"):
        found["finetuning_type"] = (
            "frozen layers keep the checkpoint's dtype; priced in fp32 like trained ones, errs high"
        )
    if (config.get("freeze_trainable_layers") or 2) < 0:
        found["freeze_trainable_layers"] = (
            "the first layers train; priced as the last ones, errs low by what those keep"
        )
    if (config.get("freeze_trainable_modules") or "all") != "all":
        found["freeze_trainable_modules"] = "some modules of a layer train; priced as all of them, errs high"
    if config.get("use_llama_pro") and not config.get("disable_gradient_checkpointing"):
        found["use_llama_pro"] = _ABOVE
    return found


_ABOVE = "frozen layers above one that trains are not checkpointed; priced as if they were, errs low"


def read_targets(config: Config) -> Fields:
    """model/adapter.py, find_all_linear_modules: every linear layer but the head."""
    key = {"lora": "lora_target", "oft": "oft_target"}.get(kind(config))
    if key is None:
        return {}
    wanted = names(config.get(key) or "all")
    return {"target_modules": "all-linear" if wanted == ("all",) else wanted}


def write_targets(fields: Fields) -> Config:
    key = {"lora": "lora_target", "oft": "oft_target"}.get(fields["method"])
    wanted = fields.get("target_modules")
    if key is None:
        return {}
    if isinstance(wanted, str) and wanted != "all-linear":
        raise Inexpressible("target_modules", wanted)
    return {key: "all" if wanted == "all-linear" else ",".join(wanted or ())}


def read_saved(config: Config) -> Fields:
    saved = names(config.get("additional_target"))
    return {"method.modules_to_save": saved} if saved and kind(config) in ("lora", "oft") else {}


def write_saved(fields: Fields) -> Config:
    saved = fields.get("method.modules_to_save")
    return {"additional_target": ",".join(saved)} if saved else {}


def read_start(config: Config) -> Fields:
    """pissa_iter: -1 is the exact decomposition."""
    if not (is_lora(config) and config.get("pissa_init")):
        return {}
    steps = config.get("pissa_iter", 16)
    return {"method.init_lora_weights": "pissa" if steps == -1 else f"pissa_niter_{steps}"}


def write_start(fields: Fields) -> Config:
    start = fields.get("method.init_lora_weights")
    if start in (None, True):
        return {}
    if start == "pissa":
        return {"pissa_init": True, "pissa_iter": -1}
    steps = str(start).removeprefix("pissa_niter_")
    if not steps.isdigit():
        raise Inexpressible("method.init_lora_weights", start)
    return {"pissa_init": True, "pissa_iter": int(steps)}


def read_oft(config: Config) -> Fields:
    if kind(config) != "oft":
        return {}
    rank, size = config.get("oft_rank") or None, config.get("oft_block_size", 32)
    return {"method.oft_block_size": size} | ({"rank": rank} if rank else {})


def write_oft(fields: Fields) -> Config:
    if fields["method"] != "oft":
        return {}
    rank = fields.get("rank") or 0
    return {"oft_rank": rank, "oft_block_size": fields.get("method.oft_block_size", 0 if rank else 32)}


# -- weights ----------------------------------------------------------------------------------------------------------


def read_format(config: Config) -> Fields:
    """model/model_utils/quantization.py, configure_quantization; nothing is cast to fp32 around the packed layers."""
    bits = config.get("quantization_bit")
    if bits is None:
        return {}
    how = str(config.get("quantization_method") or "bnb").lower()
    if how in ("bnb", "bitsandbytes"):
        if bits == 8:
            return {"format": "int8"}
        if bits != 4:
            raise RequestError(f"quantization_bit: {bits}: bitsandbytes packs to 4 or 8 bits")
        double = config.get("double_quantization", True)
        found: dict[str, Any] = {"format": config.get("quantization_type") or "nf4"}
        return found | ({"format.double_quant": True} if double else {})
    return {"format": how}


def is_packed(config: Config) -> bool:
    return read_format(config).get("format") in ("nf4", "fp4", "int8")


def write_format(fields: Fields) -> Config:
    name = fields.get("format")
    if name is None:
        return {}
    if fields["method"] not in ("lora", "oft") or name not in ("nf4", "fp4", "int8"):
        raise Inexpressible("format", name)
    if name == "int8":
        return {"quantization_bit": 8, "quantization_method": "bnb"}
    if fields.get("format.blocksize", 64) != 64:
        raise Inexpressible("format.blocksize", fields["format.blocksize"])
    double = fields.get("format.double_quant", False)
    return {
        "quantization_bit": 4,
        "quantization_method": "bnb",
        "quantization_type": name,
        "double_quantization": double,
    }


def read_precision(config: Config) -> Fields:
    """model/adapter.py, init_adapter: trained weights are fp32 unless pure_bf16; weights load in the checkpoint's dtype
    (model/loader.py), which nothing said stands for."""
    trains_base = kind(config) in ("full", "freeze") and not is_badam(config)
    if config.get("pure_bf16"):
        return {}
    if config.get("bf16") or config.get("fp16"):
        return {"precision": "bf16-mixed" if config.get("bf16") else "fp16-mixed"} | (
            {"dtype": "float32"} if trains_base else {}
        )
    return {"precision": "fp32", "dtype": "float32"} if trains_base else {}


def write_precision(fields: Fields) -> Config:
    precision, dtype = fields["precision"], fields["dtype"]
    trains_base = fields["method"] in UPCAST
    if precision.endswith("-mixed"):
        if trains_base and dtype != "float32":
            raise Inexpressible("precision", f"{precision} on {dtype} weights")
        short = precision.removesuffix("-mixed")
        return {"bf16": short == "bf16", "fp16": short == "fp16", "pure_bf16": False}
    if trains_base and dtype == "float16":
        raise Inexpressible("precision", "fp16 on float16 weights")
    return {"bf16": False, "fp16": False, "pure_bf16": trains_base and dtype == "bfloat16"}


# -- activations ------------------------------------------------------------------------------------------------------


def read_batching(config: Config) -> Fields:
    """data/collator.py: rows are padded to a multiple of 8; packed ones are full, and their mask is all ones, or with
    neat_packing one row told apart by positions (flash attention) or a mask of blocks."""
    packs = config.get("packing")
    packs = config.get("stage") == "pt" if packs is None else packs
    if config.get("neat_packing"):
        return {"batching": "packed" if config.get("flash_attn") == "fa2" else "padded"}
    return {"batching": "exact" if packs else "padded"}


def write_batching(fields: Fields) -> Config:
    batching = fields["batching"]
    if batching == "packed":
        if fields["attention"] != "flash_attention_2":
            raise Inexpressible("batching", f"packed with attention {fields['attention']}")
        if fields["micro_batch"] != 1:
            raise Inexpressible("batching", "packed with several rows (neat_packing takes one)")
        return {"packing": True, "neat_packing": True}
    return {"packing": batching == "exact", "neat_packing": False}


def batching_stand_ins(config: Config) -> Kept:
    if config.get("neat_packing") and read_batching(config)["batching"] == "padded":
        return {"neat_packing": "without flash attention packed rows carry a mask of blocks; priced as padded rows"}
    return {}


def read_recompute(config: Config) -> Fields:
    """hparams/model_args.py: on, and reentrant, unless told otherwise."""
    if config.get("disable_gradient_checkpointing"):
        return {"recompute": "none"}
    return {"recompute": "full"} | ({"recompute.use_reentrant": True} if config.get("use_reentrant_gc", True) else {})


def write_recompute(fields: Fields) -> Config:
    if fields["recompute"] not in ("none", "full"):
        raise Inexpressible("recompute", fields["recompute"])
    off = fields["recompute"] == "none"
    reentrant = {} if off else {"use_reentrant_gc": fields.get("recompute.use_reentrant", False)}
    return {"disable_gradient_checkpointing": off, **reentrant}


def stage_stand_ins(config: Config) -> Kept:
    stage = config.get("stage")
    if stage in (None, "sft", "pt"):
        return {"stage": None} if stage else {}
    return {"stage": f"{stage} is priced as supervised training; pairs of answers and other models take more, errs low"}
