"""What Axolotl's keys mean where one key is not one field. Read from axolotl 0.19.0; where, stands at each function."""

from __future__ import annotations

import math
from typing import Any

from peftplan.errors import RequestError
from peftplan.trainers import _deepspeed
from peftplan.trainers._shared import names, spread
from peftplan.trainers.rules import Config, Fields, Inexpressible, Kept, StandIn, covers, nest

PACKS = ("flash_attention_2", "flash_attention_3")
"""Attention that keeps packed documents apart by their positions (utils/schemas/enums.py)."""
LEGACY_ATTENTION = {
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}
"""Switches of older configs, in the order in which they win (LEGACY_ATTN_FLAG_TO_IMPL)."""
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
LAYOUT_KEYS = ("deepspeed", "deepspeed.*", "fsdp", "fsdp_config", "fsdp_config.*", "fsdp_version")
MESH = {
    "tensor_parallel_size": "tp",
    "context_parallel_size": "cp",
    "sequence_parallel_degree": "cp",
    "dp_shard_size": "shard",
    "dp_replicate_size": "replicate",
}
_SMALLER_8 = StandIn(value="adamw_8bit", errs="high", because="it holds less than two 8-bit states")
_LIKE_8 = StandIn(value="adamw_8bit", errs="either way", because="two states of about a byte, in another layout")
_SMALLER = StandIn(value="adamw", errs="high", because="it holds less than two states of a weight's size")
_LARGER = StandIn(value="adamw", errs="low", because="it holds more than two states of a weight's size")
OPTIMIZERS = {
    **dict.fromkeys(("muon", "dion", "sinkgd", "polora", "came_pytorch"), _SMALLER),
    **dict.fromkeys(("adopt_adamw", "adamc"), StandIn(value="adamw", errs="either way")),
    "optimi_adamw": _LARGER,
    **dict.fromkeys(("ao_adamw_4bit", "q_galore_adamw8bit", "flash_sgd", "flash_sgdw", "flash_lion"), _SMALLER_8),
    **dict.fromkeys(("ao_adamw_8bit", "ao_adamw_fp8", "flash_adamw", "flash_adam"), _LIKE_8),
    **dict.fromkeys(("adamw_hf", "lion_pytorch"), StandIn(value="adamw", errs="high")),
}
"""Axolotl's own optimizers (utils/schemas/enums.py, CustomSupportedOptimizers), and two of older versions."""
_BNB = "bnb_config_kwargs."
_LINEAR = {
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
    "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "c_attn", "c_proj", "w1", "w2", "w3", "Wqkv",
}  # fmt: skip
"""What linear layers of blocks are called; `lora_target_linear` adds nothing to a list of them."""


def is_lora(config: Config) -> bool:
    return config.get("adapter") in ("lora", "qlora")


# -- method -----------------------------------------------------------------------------------------------------------


def read_method(config: Config) -> Fields:
    """loaders/adapter.py, load_adapter: none is full fine-tuning; `unfrozen_parameters` freezes the rest of it."""
    adapter = config.get("adapter") or None
    if adapter is None:
        return _unfrozen(config.get("unfrozen_parameters"))
    if adapter not in ("lora", "qlora"):
        raise RequestError(f"adapter: {adapter!r} is not read; known: lora, qlora, or none for full fine-tuning")
    return {"method": "lora"}


def _unfrozen(patterns: Any) -> Fields:
    listed = names(patterns)
    if listed == ("bias$",):
        return {"method": "bitfit"}
    if listed and all(pattern.endswith(".bias$") for pattern in listed):
        return {"method": "bitfit", "method.train": tuple(pattern.removesuffix(".bias$") for pattern in listed)}
    return {"method": "full"}


def write_method(fields: Fields) -> Config:
    method = fields["method"]
    if method == "lora":
        return {"adapter": "qlora" if fields.get("format") in ("nf4", "fp4") else "lora"}
    if method == "full":
        return {}
    if method == "bitfit":
        train = fields.get("method.train")
        return {"unfrozen_parameters": [f"{name}.bias$" for name in train] if train else ["bias$"]}
    raise Inexpressible("method", method)


def method_stand_ins(config: Config) -> Kept:
    patterns = config.get("unfrozen_parameters")
    if not patterns or read_method(config)["method"] == "bitfit":
        return {}
    if is_lora(config):
        return {"unfrozen_parameters": "weights trained beside the adapter are not priced; errs low"}
    return {"unfrozen_parameters": "priced as if every weight trained; errs high by the others' gradients and states"}


def read_targets(config: Config) -> Fields:
    """loaders/adapter.py, _build_peft_lora_config: `lora_target_linear` joins every linear layer but the head."""
    if not is_lora(config):
        return {}
    wanted = config.get("lora_target_modules")
    if config.get("lora_target_linear") is True:
        return {"target_modules": "all-linear"}
    if not wanted:
        return {}
    return {"target_modules": wanted if isinstance(wanted, str) else tuple(wanted)}


def targets_stand_ins(config: Config) -> Kept:
    wanted = config.get("lora_target_modules")
    if not (is_lora(config) and config.get("lora_target_linear") is True and wanted):
        return {}
    more = [name for name in names(wanted) if name not in _LINEAR]
    why = f"lora_target_linear is priced, without {', '.join(more)}; errs low" if more else None
    return {"lora_target_modules": why}


def write_targets(fields: Fields) -> Config:
    wanted = fields.get("target_modules")
    if fields["method"] != "lora":
        return {}
    if wanted == "all-linear":
        return {"lora_target_linear": True}
    return {"lora_target_modules": list(wanted) if isinstance(wanted, tuple) else wanted}


# -- weights ----------------------------------------------------------------------------------------------------------


def read_format(config: Config) -> Fields:
    """loaders/model.py, _set_quantization_config. Norms, embeddings and head, which peft casts to fp32, are cast back
    to the model's dtype (_configure_embedding_dtypes)."""
    adapter = config.get("adapter")
    if adapter == "qlora" and config.get("load_in_4bit"):
        double = config.get(_BNB + "bnb_4bit_use_double_quant", True)
        compute = config.get(_BNB + "bnb_4bit_compute_dtype")
        found: dict[str, Any] = {"format": config.get(_BNB + "bnb_4bit_quant_type", "nf4")}
        found |= {"format.double_quant": True} if double else {}
        return found | ({"format.compute_dtype": compute} if compute else {})
    if adapter == "lora" and config.get("load_in_8bit"):
        return {"format": "int8"}
    if adapter == "qlora":
        raise RequestError("adapter: qlora needs load_in_4bit: true")
    return {}


def is_packed(config: Config) -> bool:
    return "format" in read_format(config)


def write_format(fields: Fields) -> Config:
    name = fields.get("format")
    if name is None:
        return {"load_in_4bit": False, "load_in_8bit": False}
    if fields["method"] != "lora" or name not in ("nf4", "fp4", "int8"):
        raise Inexpressible("format", name)
    if name == "int8":
        return {"load_in_4bit": False, "load_in_8bit": True}
    if fields.get("format.blocksize", 64) != 64:
        raise Inexpressible("format.blocksize", fields["format.blocksize"])
    bnb = {"bnb_4bit_quant_type": name, "bnb_4bit_use_double_quant": fields.get("format.double_quant", False)}
    if fields.get("format.compute_dtype"):
        bnb["bnb_4bit_compute_dtype"] = fields["format.compute_dtype"]
    return {"load_in_4bit": True, "load_in_8bit": False} | {_BNB + key: value for key, value in bnb.items()}


def format_stand_ins(config: Config) -> Kept:
    """loaders/model.py reads `load_in_4bit` for qlora and `load_in_8bit` for lora; another pair loads unpacked."""
    adapter = config.get("adapter")
    ignored = {"lora": "load_in_4bit", "qlora": "load_in_8bit"}.get(str(adapter))
    if ignored and config.get(ignored):
        return {ignored: f"Axolotl does not read it for adapter: {adapter}; priced without"}
    return {}


def read_precision(config: Config) -> Fields:
    """utils/config/__init__.py, resolve_dtype, on a GPU that has bf16; core/builders/base.py, autocast."""
    bf16, fp16 = config.get("bf16", "auto"), config.get("fp16")
    if bf16 == "full":
        return {"dtype": "bfloat16", "precision": "bf16"}
    if bf16 == "auto" or (bf16 is None and "bf16" not in config):
        bf16 = not fp16
    if bf16 or config.get("bfloat16"):
        return {"dtype": "bfloat16", "precision": "bf16-mixed"}
    if fp16:
        return {"dtype": "float16", "precision": "fp16-mixed"}
    if config.get("float16") or config.get("load_in_8bit"):
        return {"dtype": "float16", "precision": "fp16"}
    return {"dtype": "float32", "precision": "fp32"}


def write_precision(fields: Fields) -> Config:
    said = (fields["dtype"], fields["precision"])
    known = {
        ("bfloat16", "bf16-mixed"): {"bf16": True, "fp16": False},
        ("float16", "fp16-mixed"): {"bf16": False, "fp16": True},
        ("float16", "fp16"): {"bf16": False, "fp16": False, "float16": True},
        ("float32", "fp32"): {"bf16": False, "fp16": False},
    }
    if said not in known:
        raise Inexpressible("precision", f"{said[1]} on {said[0]} weights")
    return known[said]


def read_adapter_dtype(config: Config) -> Fields:
    """peft_autocast_adapter_dtype: false leaves adapters in the base's dtype; on int8 layers they are made in fp32."""
    if config.get("peft_autocast_adapter_dtype") is not False or not is_lora(config) or config.get("load_in_8bit"):
        return {}
    return {"adapter_dtype": read_precision(config)["dtype"]}


def write_adapter_dtype(fields: Fields) -> Config:
    asked = fields.get("adapter_dtype", "auto")
    if fields["method"] != "lora" or asked == "auto":
        return {}
    if asked == "float32":
        return {"peft_autocast_adapter_dtype": True}
    if asked != fields["dtype"] or fields.get("format") == "int8":
        raise Inexpressible("adapter_dtype", asked)
    return {"peft_autocast_adapter_dtype": False}


# -- activations ------------------------------------------------------------------------------------------------------


def attention_of(config: Config) -> str:
    """utils/schemas/config.py, normalize_attn_implementation; transformers' own default where nothing is said."""
    named = config.get("attn_implementation")
    if named:
        return str(named)
    return next((impl for flag, impl in LEGACY_ATTENTION.items() if config.get(flag)), "sdpa")


def read_attention(config: Config) -> Fields:
    name = attention_of(config)
    return {"attention": name if name in ("eager", "sdpa", *PACKS) else "flash_attention_2"}


def attention_stand_ins(config: Config) -> Kept:
    name = attention_of(config)
    if name in ("eager", "sdpa", *PACKS):
        return {}
    key = next((key for key in ("attn_implementation", *LEGACY_ATTENTION) if config.get(key)), "attn_implementation")
    return {
        key: f"{name} is not modelled; priced as flash_attention_2, which keeps the same tensors: little either way"
    }


def write_attention(fields: Fields) -> Config:
    name = fields["attention"]
    if name not in ("eager", "sdpa", *PACKS):
        raise Inexpressible("attention", name)
    return {"attn_implementation": name}


def read_batching(config: Config) -> Fields:
    """core/trainers/base.py, the multipack sampler: attention that packs sees one row of micro_batch_size packs, other
    attention one row each with a mask. core/builders/causal.py: unpacked rows are padded to a multiple of 64."""
    packs = read_attention(config)["attention"] in PACKS
    flattened = config.get("batch_flattening") and config.get("micro_batch_size", 1) > 1
    if packs and (config.get("sample_packing") or flattened):
        return {"batching": "packed"}
    if config.get("micro_batch_size", 1) == 1 and config.get("pad_to_sequence_len") is False:
        return {"batching": "exact"}
    return {"batching": "padded"}


def write_batching(fields: Fields) -> Config:
    batching = fields["batching"]
    if batching == "packed":
        if fields["attention"] not in PACKS:
            raise Inexpressible("batching", f"packed with attention {fields['attention']}")
        return {"sample_packing": True, "pad_to_sequence_len": True}
    if batching == "exact" and fields["micro_batch"] > 1:
        raise Inexpressible("batching", "exact with several sequences (that is the data's to say)")
    return {"sample_packing": False, "pad_to_sequence_len": batching == "padded"}


def batching_stand_ins(config: Config) -> Kept:
    if config.get("sample_packing") and read_batching(config)["batching"] != "packed":
        why = f"{attention_of(config)} gets one row a pack and a mask; priced as padded rows"
        return {"sample_packing": why}
    return {key: None for key in ("batch_flattening",) if config.get(key)}


def read_recompute(config: Config) -> Fields:
    """core/builders/base.py, _configure_gradient_checkpointing: not reentrant unless told."""
    sharded = any(config.get(f"fsdp_config.{prefix}activation_checkpointing") for prefix in ("", "fsdp_"))
    if not config.get("gradient_checkpointing") and not sharded:
        return {"recompute": "none"}
    reentrant = config.get("gradient_checkpointing_kwargs.use_reentrant")
    return {"recompute": "full"} | ({"recompute.use_reentrant": True} if reentrant else {})


def write_recompute(fields: Fields) -> Config:
    if fields["recompute"] == "none":
        return {"gradient_checkpointing": False}
    if fields["recompute"] != "full":
        raise Inexpressible("recompute", fields["recompute"])
    reentrant = fields.get("recompute.use_reentrant", False)
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs.use_reentrant": reentrant}


def recompute_stand_ins(config: Config) -> Kept:
    if config.get("gradient_checkpointing") in (None, True, False):
        return {}
    return {"gradient_checkpointing": "priced as recomputation that keeps each layer's input on the GPU; errs high"}


# -- kernels ----------------------------------------------------------------------------------------------------------


def kernels_stand_ins(config: Config) -> Kept:
    """utils/schemas/config.py, check_auto_enable_lora_kernels: on where no key is there, int8 aside."""
    why = "Axolotl's fused LoRA kernels keep fewer activations; priced without them, errs high"
    on = {key: why for key in KERNELS if config.get(key)}
    silent = is_lora(config) and all(config.get(key) is None for key in KERNELS)
    excused = config.get("load_in_8bit") or config.get("trust_remote_code") or config.get("rl")
    if silent and not excused:
        return {KERNELS[0]: "on where no lora_*_kernel key is set: " + why}
    return on


def write_kernels(fields: Fields) -> Config:
    return dict.fromkeys(KERNELS, False) if fields["method"] == "lora" else {}


def plugins_stand_ins(config: Config) -> Kept:
    listed = names(config.get("plugins"))
    if any(name.endswith("CutCrossEntropyPlugin") for name in listed) and config.get("cut_cross_entropy", True):
        return {"plugins": "cut cross-entropy never makes the logits; priced with them, errs high"}
    if any(name.endswith("SpectrumPlugin") for name in listed):
        return {"plugins": "Spectrum trains some of the layers; priced as if all trained, errs high"}
    return {"plugins": None} if listed else {}


# -- machines ---------------------------------------------------------------------------------------------------------


def read_layout(config: Config) -> Fields:
    """`fsdp_config`, with or without the list `fsdp` and the prefix of 2025 and before; `deepspeed`, a file's name or
    its content; sizes of the device mesh, whose product is the number of GPUs."""
    inline = {key.partition(".")[2]: value for key, value in config.items() if key.startswith("deepspeed.")}
    if inline:
        fields, _ = _deepspeed.read(nest(inline))
        return {key: value for key, value in fields.items() if key in ("layout", "offload")}
    if config.get("deepspeed"):
        return {"layout": _deepspeed.stage_in_name(str(config["deepspeed"]))}
    sizes = {name: config.get(key) or 1 for key, name in MESH.items()}
    parts = [f"{name}={size}" for name, size in sizes.items() if name in ("tp", "cp") and size > 1]
    fsdp = ["fsdp"] if config.get("fsdp") or any(key.startswith("fsdp_config.") for key in config) else []
    layout = ",".join([*fsdp, *parts])
    offload = any(config.get(f"fsdp_config.{prefix}offload_params") for prefix in ("", "fsdp_"))
    offload = offload or "offload" in names(config.get("fsdp"))
    gpus = math.prod(sizes.values())
    return (
        ({"layout": layout} if layout else {})
        | ({"offload": "params+optimizer"} if fsdp and offload else {})
        | ({"gpus": gpus} if gpus > 1 else {})
    )


def layout_stand_ins(config: Config) -> Kept:
    """Everything is kept as it stands: it says more than a layout's name."""
    keys = [key for key in config if covers((*LAYOUT_KEYS, *MESH), key)]
    found: dict[str, str | None] = dict.fromkeys(keys)
    if isinstance(config.get("deepspeed"), str):
        found["deepspeed"] = _deepspeed.guessed(config["deepspeed"])
    return found


def write_layout(fields: Fields) -> Config:
    """FSDP2, or the DeepSpeed file beside the config."""
    keys = spread(fields)
    if fields.get("layout") != "fsdp":
        return keys
    offload = fields.get("offload") or "none"
    if offload not in ("none", "params+optimizer"):
        raise Inexpressible("offload", f"{offload} with --layout fsdp; it moves params+optimizer together")
    said = {
        "offload_params": offload != "none",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False,
    }
    return {"fsdp_version": 2} | {f"fsdp_config.{key}": value for key, value in said.items()}
