"""What Axolotl's keys of the training step mean: attention, packing, recomputation, kernels, machines. Read from
axolotl 0.19.0; where, stands at each function."""

from __future__ import annotations

import math
from typing import Any

from peftplan.trainers import _deepspeed
from peftplan.trainers._axolotl import is_lora
from peftplan.trainers._recompute import ATTENTION, keeps_attention
from peftplan.trainers._shared import names, spread
from peftplan.trainers._shared import write_recompute as _write_plain
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
MESH = {
    "tp": ("tensor_parallel_size",),
    "cp": ("context_parallel_size", "sequence_parallel_degree"),
    "shard": ("dp_shard_size",),
    "replicate": ("dp_replicate_size",),
}
LAYOUT_KEYS = (
    "deepspeed", "deepspeed.*", "fsdp", "fsdp_config", "fsdp_config.*", "fsdp_version",
    *(key for keys in MESH.values() for key in keys),
)  # fmt: skip
_SMALLER_8 = StandIn(value="adamw_8bit", errs="high", because="it holds less than two 8-bit states")
_LIKE_8 = StandIn(value="adamw_8bit", errs="either way", because="two states of about a byte, in another layout")
_LARGER = StandIn(value="adamw", errs="low", because="it holds more than two states of a weight's size")
_LIKE_MUON = StandIn(value="muon", errs="either way", because="one momentum of matrices, other temporaries")
OPTIMIZERS = {
    "muon": StandIn(value="muon", errs="either way", because="torch's Muon, not Axolotl's own"),
    **dict.fromkeys(("dion", "sinkgd", "polora"), _LIKE_MUON),
    "came_pytorch": StandIn(value="adafactor", errs="low", because="it holds a first moment and a second confidence"),
    **dict.fromkeys(("adopt_adamw", "adamc"), StandIn(value="adamw", errs="either way")),
    "optimi_adamw": _LARGER,
    **dict.fromkeys(("flash_sgd", "flash_sgdw", "flash_lion"), _SMALLER_8),
    **dict.fromkeys(("flash_adamw", "flash_adam"), _LIKE_8),
    "adamw_hf": StandIn(value="adamw", errs="high"),
    "lion_pytorch": StandIn(value="lion", errs="high", because="its state has the weight's own dtype"),
}
"""Axolotl's own optimizers (utils/schemas/enums.py, CustomSupportedOptimizers), and two of older versions."""
MODELLED = ("ao_adamw_4bit", "ao_adamw_8bit", "ao_adamw_fp8", "q_galore_adamw8bit")
"""Those of them that are priced as they are."""


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
    """core/builders/base.py, _configure_gradient_checkpointing: not reentrant unless told; where activations are
    offloaded, adapters are trained without (loaders/model.py)."""
    sharded = any(config.get(f"fsdp_config.{prefix}activation_checkpointing") for prefix in ("", "fsdp_"))
    if not config.get("gradient_checkpointing") and not sharded:
        return {"recompute": "none"}
    where = offloading(config)
    moved = {"recompute.offload": True} if where else {}
    if where and where != "hidden_states" and config.get("adapter"):
        return {"recompute": "none", **moved}
    if any(config.get(key) for key in SELECTS):
        return {**ATTENTION, **moved}
    reentrant = config.get("gradient_checkpointing_kwargs.use_reentrant")
    return {"recompute": "full"} | ({"recompute.use_reentrant": True} if reentrant else {}) | moved


SELECTS = ("selective_checkpointing", "selective_checkpointing.save")
RECOMPUTES = (
    "gradient_checkpointing", "gradient_checkpointing_kwargs.use_reentrant", "activation_offloading", *SELECTS,
)  # fmt: skip


def offloading(config: Config) -> Any:
    """How activations are offloaded, under the name of today."""
    old = {"offload": True, "offload_disk": "disk"}.get(str(config.get("gradient_checkpointing")))
    return old or config.get("activation_offloading")


def write_recompute(fields: Fields) -> Config:
    """Adapters that recompute offload what is checkpointed only; those that do not, everything."""
    moved, name = fields.get("recompute.offload"), fields["recompute"]
    if name == "selective" and keeps_attention(fields):
        kept = {"gradient_checkpointing": True, "selective_checkpointing": True}
        return kept | ({"activation_offloading": "hidden_states"} if moved else {})
    if name == "none" and moved:
        if fields["method"] == "full":
            raise Inexpressible("recompute", "none with --offload activations and without an adapter")
        return {"gradient_checkpointing": True, "activation_offloading": True}
    return {**_write_plain(fields), **({"activation_offloading": "hidden_states"} if moved else {})}


def recompute_stand_ins(config: Config) -> Kept:
    found = {}
    if offloading(config) == "disk":
        found["activation_offloading"] = "what lies on disk is priced as if it lay in host memory"
    chosen = config.get("selective_checkpointing.save") or ["attention"]
    if list(chosen) != ["attention"]:
        found["selective_checkpointing.save"] = "priced as if attention alone were kept"
    return found


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
    sizes = {name: max(config.get(key) or 1 for key in keys) for name, keys in MESH.items()}
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
    keys = [key for key in config if covers(LAYOUT_KEYS, key)]
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
