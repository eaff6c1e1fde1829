"""Phi-3, Phi-3.5 (dense), Phi-4 and Phi-4-mini.

Mirrors transformers 5.23.0 models/phi3: q, k, v in one projection, gate and up in one; dropout on both
residual branches; possibly only a part of each head rotates; a `sliding_window` holds for every layer.
`embd_pdrop` is a key of the class that its code does not use.
"""

from __future__ import annotations

from peftplan.arch.config import Config, show
from peftplan.arch.core import Arch, Attention, Layer, Mlp
from peftplan.units import round_up

MODEL_TYPES = ("phi3",)
KEYS = ("sliding_window", "resid_pdrop", "embd_pdrop", "original_max_position_embeddings")


def read(config: Config) -> Arch:
    mlp = Mlp(size=config.size("intermediate_size"), activation=config.activation(), fused_gate_up=True)
    layer = Layer(attention=_attention(config), mlp=mlp, residual_dropout=config.probability("resid_pdrop"))
    return config.decoder([layer] * config.depth, tied=False, max_positions=4096)


def _attention(config: Config) -> Attention:
    return Attention(
        heads=config.heads,
        kv_heads=config.kv_heads(),
        head_dim=config.head_dim(),
        fused_qkv=True,
        rotary_concat=True,
        rotary_dim=_rotary_dim(config),
        window=config.size("sliding_window") if config.stated("sliding_window") else None,
        dropout=config.probability("attention_dropout"),
    )


def _rotary_dim(config: Config) -> int:
    """int(head_dim x partial_rotary_factor), up to the next even number (frequencies come in pairs)."""
    head_dim, factor = config.head_dim(), _rotary_factor(config)
    if head_dim * factor < 1:
        raise config.wrong(f"partial_rotary_factor {factor} of head_dim {head_dim} leaves nothing to rotate")
    return round_up(int(head_dim * factor), 2)


def _rotary_factor(config: Config) -> float:
    nested = config.fields("rope_scaling") or config.fields("rope_parameters")
    value = nested.get("partial_rotary_factor", config.values.get("partial_rotary_factor", 1.0))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise config.wrong(f"partial_rotary_factor must be above 0 and at most 1, not {show(value)}")
    return float(value)
