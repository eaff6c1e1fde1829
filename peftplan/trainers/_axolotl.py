"""What Axolotl's keys mean where one key is not one field. Read from axolotl 0.19.0; where, stands at each function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftplan.errors import RequestError
from peftplan.trainers._shared import names
from peftplan.trainers.rules import Config, Fields, Inexpressible, Remarks

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


def method_stand_ins(config: Config) -> Remarks:
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


def targets_stand_ins(config: Config) -> Remarks:
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
        found: dict[str, Any] = {"format": config.get(_BNB + "bnb_4bit_quant_type", "nf4"), "format.prepare": False}
        return found | ({"format.double_quant": True} if double else {}) | (
            {"format.compute_dtype": compute} if compute else {}
        )  # fmt: skip
    if adapter == "lora" and config.get("load_in_8bit"):
        return {"format": "int8", "format.prepare": False}
    if adapter == "qlora":
        raise RequestError("adapter: qlora needs load_in_4bit: true")
    return {}


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


def format_stand_ins(config: Config) -> Remarks:
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
    if bf16 == "auto" or bf16 is None and "bf16" not in config:
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


def attention_stand_ins(config: Config) -> Remarks:
    name = attention_of(config)
    if name in ("eager", "sdpa", *PACKS):
        return {}
    key = next((key for key in ("attn_implementation", *LEGACY_ATTENTION) if config.get(key)), "attn_implementation")
    return {key: f"{name} is not modelled; priced as flash_attention_2, which keeps the same tensors: little either way"}


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


def batching_stand_ins(config: Config) -> Remarks:
    if config.get("sample_packing") and read_batching(config)["batching"] != "packed":
        why = f"{attention_of(config)} gets one row a pack and a mask; priced as padded rows"
        return {"sample_packing": why}
    return {key: None for key in ("batch_flattening",) if config.get(key)}


def read_recompute(config: Config) -> Fields:
    """core/builders/base.py, _configure_gradient_checkpointing: not reentrant unless told."""
    if not config.get("gradient_checkpointing"):
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


def recompute_stand_ins(config: Config) -> Remarks:
    if config.get("gradient_checkpointing") in (None, True, False):
        return {}
    return {"gradient_checkpointing": "priced as recomputation that keeps each layer's input on the GPU; errs high"}


# -- kernels ----------------------------------------------------------------------------------------------------------


def read_kernels(config: Config) -> Fields:
    del config
    return {}


def kernels_stand_ins(config: Config) -> Remarks:
    """utils/schemas/config.py, check_auto_enable_lora_kernels: on where no key is there, but for int8 and trusted code."""
    why = "Axolotl's fused LoRA kernels keep fewer activations; priced without them, errs high"
    on = {key: why for key in KERNELS if config.get(key)}
    silent = is_lora(config) and all(config.get(key) is None for key in KERNELS)
    excused = config.get("load_in_8bit") or config.get("trust_remote_code") or config.get("rl")
    if silent and not excused:
        return {KERNELS[0]: "on where no lora_*_kernel key is set: " + why}
    return on


def write_kernels(fields: Fields) -> Config:
    return dict.fromkeys(KERNELS, False) if fields["method"] == "lora" else {}


def plugins_stand_ins(config: Config) -> Remarks:
    listed = names(config.get("plugins"))
    if any(name.endswith("CutCrossEntropyPlugin") for name in listed) and config.get("cut_cross_entropy", True):
        return {"plugins": "cut cross-entropy never makes the logits; priced with them, errs high"}
    if any(name.endswith("SpectrumPlugin") for name in listed):
        return {"plugins": "Spectrum trains some of the layers; priced as if all trained, errs high"}
    return {"plugins": None} if listed else {}


# -- machines ---------------------------------------------------------------------------------------------------------


def read_layout(config: Config) -> Fields:
    """fsdp (a list, until 2025) and fsdp_config; deepspeed (a file's name or its content)."""
    if config.get("deepspeed") or any(key.startswith("deepspeed.") for key in config):
        return _deepspeed(config)
    sizes = {"tp": config.get("tensor_parallel_size"), "cp": config.get("context_parallel_size")}
    parts = [f"{name}={size}" for name, size in sizes.items() if size and size > 1]
    fsdp = any(key == "fsdp" or key.startswith("fsdp_config") for key in config if config[key] not in (None, [], {}))
    if fsdp:
        offload = config.get("fsdp_config.offload_params") or config.get("fsdp_config.fsdp_offload_params")
        offload = offload or "offload" in names(config.get("fsdp"))
        return {"layout": ",".join(["fsdp", *parts])} | ({"offload": "parameters"} if offload else {})
    return {"layout": ",".join(parts)} if parts else {}


def _deepspeed(config: Config) -> Fields:
    said = config.get("deepspeed")
    if isinstance(said, str):
        stage = next((n for n in "3210" if f"zero{n}" in said.lower()), None)
        if stage is None:
            raise RequestError(f"deepspeed: {said}: its ZeRO stage is not read from the file; write its JSON here instead")
        return {"layout": f"zero{stage}"} | ({"offload": "parameters"} if "offload" in said.lower() else {})
    zero = "deepspeed.zero_optimization."
    devices: Mapping[str, Any] = {
        what: config.get(f"{zero}offload_{key}.device") for what, key in (("optimizer", "optimizer"), ("parameters", "param"))
    }
    moved = [what for what, device in devices.items() if device in ("cpu", "nvme")]
    return {"layout": f"zero{config.get(zero + 'stage', 0)}"} | ({"offload": ",".join(moved)} if moved else {})
