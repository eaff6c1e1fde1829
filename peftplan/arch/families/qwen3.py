"""Qwen3 dense.

Mirrors transformers 5.23.0 models/qwen3: like Qwen2 with RMS norms on queries and keys, one bias switch for
all four projections, and a `head_dim` of 128 where the config does not state one.
"""

from __future__ import annotations

from peftplan.arch.config import Config
from peftplan.arch.core import Arch, Attention
from peftplan.arch.families import qwen2

MODEL_TYPES = ("qwen3",)
KEYS = ("attention_bias", *qwen2.KEYS)


def read(config: Config) -> Arch:
    bias = config.flag("attention_bias", False)
    attention = Attention(
        heads=config.heads,
        kv_heads=config.kv_heads(32),
        head_dim=config.head_dim(128),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        rotary_dim=config.head_dim(128),
        dropout=config.probability("attention_dropout"),
    )
    return config.decoder(qwen2.stack(config, attention), tied=False, max_positions=32768)
