"""Mixtral 8x7B and 8x22B.

Mirrors transformers 5.23.0 models/mixtral: Mistral's attention, without a window unless `sliding_window` says so; every
layer's feed-forward is a router and experts of `intermediate_size`, whose weights stay in float32.
"""

from __future__ import annotations

from peftplan.arch.config import Config
from peftplan.arch.core import Arch, Attention, Experts, Layer
from peftplan.arch.families import _experts

MODEL_TYPES = ("mixtral",)
KEYS = (*_experts.KEYS, "sliding_window", "num_local_experts", "router_jitter_noise")


def read(config: Config) -> Arch:
    if config.probability("router_jitter_noise"):
        raise config.unsupported("router_jitter_noise is not modelled; set it to 0")
    layer = Layer(attention=_attention(config), mlp=_feed_forward(config))
    return config.decoder([layer] * config.depth, tied=False, max_positions=4096 * 32, returns_cache=True)


def _attention(config: Config) -> Attention:
    return Attention(
        heads=config.heads,
        kv_heads=config.kv_heads(8),
        head_dim=config.head_dim(),
        rotary_dim=config.head_dim(),
        window=config.size("sliding_window") if config.stated("sliding_window") else None,
        dropout=config.probability("attention_dropout"),
    )


def _feed_forward(config: Config) -> Experts:
    number = config.size("num_local_experts", 8)
    return Experts(
        number=number,
        top_k=_experts.top_k(config, 2, of=number),
        size=config.size("intermediate_size"),
        activation=config.activation(),
        router="softmax_fp32",
        normalized=True,
        implementation=_experts.implementation(config),
    )
