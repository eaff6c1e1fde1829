"""Granite 3.x dense (IBM), PowerLM.

Mirrors transformers 5.23.0 models/granite: a Llama whose embeddings, both residual branches and logits are multiplied
by numbers of the config, each into a new tensor, whatever the number is. The attention's own multiplier takes the place
of 1/sqrt(head_dim) and moves no memory.
"""

from __future__ import annotations

from peftplan.arch.config import Config
from peftplan.arch.core import Arch, Attention, Layer, Mlp

MODEL_TYPES = ("granite",)
KEYS = (
    "attention_bias",
    "mlp_bias",
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
    "attention_multiplier",
)


def read(config: Config) -> Arch:
    layer = Layer(attention=_attention(config), mlp=_mlp(config))
    return config.decoder([layer] * config.depth, tied=False, max_positions=2048, returns_cache=True, multiplies=True)


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
