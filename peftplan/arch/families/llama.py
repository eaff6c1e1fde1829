"""Llama 1-3 and everything that saves itself as one: TinyLlama, SmolLM, SmolLM2, Vicuna, Yi, Falcon3, ...

Mirrors transformers 5.23.0 models/llama: one bias switch for all four projections, one for the feed-forward.
"""

from __future__ import annotations

from peftplan.arch.config import Config
from peftplan.arch.core import Arch, Attention, Layer, Mlp

MODEL_TYPES = ("llama",)
KEYS = ("attention_bias", "mlp_bias", "pretraining_tp")


def read(config: Config) -> Arch:
    hidden, heads = config.size("hidden_size"), config.heads
    if hidden % heads:  # LlamaConfig.validate_architecture, head_dim given or not
        raise config.wrong(f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})")
    layer = Layer(attention=_attention(config), mlp=_mlp(config))
    return config.decoder([layer] * config.depth, tied=False, max_positions=2048, returns_cache=True)


def _attention(config: Config) -> Attention:
    bias = config.flag("attention_bias", False)
    return Attention(
        heads=config.heads,
        kv_heads=config.kv_heads(),
        head_dim=config.head_dim(),
        qkv_bias=bias,
        out_bias=bias,
        rotary_dim=config.head_dim(),
        dropout=config.probability("attention_dropout"),
    )


def _mlp(config: Config) -> Mlp:
    return Mlp(
        size=config.size("intermediate_size"),
        activation=config.activation(),
        bias=config.flag("mlp_bias", False),
    )
