"""Gemma 1, 1.1 and CodeGemma.

Mirrors transformers 5.23.0 models/gemma: norms scale by 1 + weight, embeddings by sqrt(hidden), the head is
tied, `head_dim` is 256 where not stated. Only `hidden_act` is read (`hidden_activation` is not), and its
value "gelu" means the tanh approximation.
"""

from __future__ import annotations

from peftplan.arch.config import Config
from peftplan.arch.core import Arch, Attention, Layer, Mlp

MODEL_TYPES = ("gemma",)
KEYS = ("attention_bias", "hidden_activation", "use_bidirectional_attention")


def read(config: Config) -> Arch:
    if config.stated("use_bidirectional_attention") and config.flag("use_bidirectional_attention", False):
        raise config.unsupported("use_bidirectional_attention is not modelled; only causal attention is")
    layer = Layer(attention=_attention(config), mlp=_mlp(config))
    return config.decoder([layer] * config.depth, tied=True, max_positions=8192, norm="rms_plus_one", embed_scale=True)


def _attention(config: Config) -> Attention:
    bias = config.flag("attention_bias", False)
    return Attention(
        heads=config.heads,
        kv_heads=config.kv_heads(16),
        head_dim=config.head_dim(256),
        qkv_bias=bias,
        out_bias=bias,
        rotary_dim=config.head_dim(256),
        dropout=config.probability("attention_dropout"),
    )


def _mlp(config: Config) -> Mlp:
    activation = config.activation("gelu_pytorch_tanh")
    return Mlp(
        size=config.size("intermediate_size"),
        activation="gelu_tanh" if activation == "gelu" else activation,
    )
