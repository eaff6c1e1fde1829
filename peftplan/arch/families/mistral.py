"""Mistral 7B to Large, Nemo, Codestral (dense; the multi-modal Mistral 3 is another family).

Mirrors transformers 5.23.0 models/mistral: no biases; a `sliding_window` holds for every layer, and a config
that does not mention it gets 4096 (null switches it off).
"""

from __future__ import annotations

from peftplan.arch.config import Config
from peftplan.arch.core import Arch, Attention, Layer, Mlp

MODEL_TYPES = ("mistral",)
KEYS = ("sliding_window",)


def read(config: Config) -> Arch:
    mlp = Mlp(size=config.size("intermediate_size"), activation=config.activation())
    layer = Layer(attention=_attention(config), mlp=mlp)
    return config.decoder([layer] * config.depth, tied=False, max_positions=4096 * 32)


def _attention(config: Config) -> Attention:
    return Attention(
        heads=config.heads,
        kv_heads=config.kv_heads(8),
        head_dim=config.head_dim(),
        rotary_dim=config.head_dim(),
        window=_window(config),
        dropout=config.probability("attention_dropout"),
    )


def _window(config: Config) -> int | None:
    if "sliding_window" in config.values and not config.stated("sliding_window"):
        return None
    return config.size("sliding_window", 4096)
