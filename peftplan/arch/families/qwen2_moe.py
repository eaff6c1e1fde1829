"""Qwen1.5-MoE and Qwen2-57B-A14B.

Mirrors transformers 5.23.0 models/qwen2_moe: Qwen2's attention with a switch for its biases; a shared expert whose
output a sigmoid scales; some layers may be dense. With `use_sliding_window` every other layer below `max_window_layers`
has the window, and both masks are made whether layers use them or not.
"""

from __future__ import annotations

from dataclasses import replace

from peftplan.arch.config import Config
from peftplan.arch.core import Arch, Attention, Experts, Layer, Mlp
from peftplan.arch.families import _experts
from peftplan.arch.families.qwen2 import layer_types

MODEL_TYPES = ("qwen2_moe",)
KEYS = (
    *_experts.KEYS,
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "qkv_bias",
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_experts",
    "norm_topk_prob",
)


def read(config: Config) -> Arch:
    attention, dense, experts = _attention(config), _dense(config), _feed_forward(config)
    layers = [
        Layer(attention=replace(attention, window=window), mlp=experts if sparse else dense)
        for window, sparse in zip(_windows(config), _experts.sparse_layers(config), strict=True)
    ]
    return config.decoder(layers, tied=False, max_positions=32768, idle_window=_width(config))


def _attention(config: Config) -> Attention:
    return Attention(
        heads=config.heads,
        kv_heads=config.kv_heads(16),
        head_dim=config.head_dim(),
        qkv_bias=config.flag("qkv_bias", True),
        rotary_dim=config.head_dim(),
        dropout=config.probability("attention_dropout"),
    )


def _dense(config: Config) -> Mlp:
    return Mlp(size=config.size("intermediate_size"), activation=config.activation())


def _feed_forward(config: Config) -> Experts:
    number = config.size("num_experts", 60)
    return Experts(
        number=number,
        top_k=_experts.top_k(config, 4, of=number),
        size=config.size("moe_intermediate_size", 1408),
        activation=config.activation(),
        normalized=config.flag("norm_topk_prob", False),
        shared_size=config.size("shared_expert_intermediate_size", 5632),
        shared_gate=True,
        implementation=_experts.implementation(config),
    )


def _width(config: Config) -> int:
    """What the class makes of `sliding_window`: 0 where it is not in use."""
    return config.size("sliding_window", 4096) if config.flag("use_sliding_window", False) else 0


def _windows(config: Config) -> list[int | None]:
    width, kinds = _width(config), layer_types(config)
    if kinds is None:
        last = config.size("max_window_layers", 28) if width else 0
        kinds = ["sliding_attention" if i % 2 == 0 and i < last else "full_attention" for i in range(config.depth)]
    if not width and "sliding_attention" in kinds:
        raise config.wrong(
            "layer_types names sliding_attention, which needs use_sliding_window true and a sliding_window"
        )
    return [width if kind == "sliding_attention" else None for kind in kinds]
