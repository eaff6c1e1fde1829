"""Qwen1.5, Qwen2, Qwen2.5 dense and the models distilled into them.

Mirrors transformers 5.23.0 models/qwen2: biases on q, k and v, none on o; a sliding window only where
`use_sliding_window` is on, in the layers that `layer_types` names (else from `max_window_layers` up).
"""

from __future__ import annotations

from dataclasses import replace

from peftplan.arch.config import Config, show
from peftplan.arch.core import Arch, Attention, Layer, Mlp

MODEL_TYPES = ("qwen2",)
KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


def read(config: Config) -> Arch:
    attention = Attention(
        heads=config.heads,
        kv_heads=config.kv_heads(32),
        head_dim=config.head_dim(),
        qkv_bias=True,
        rotary_dim=config.head_dim(),
        dropout=config.probability("attention_dropout"),
    )
    return config.decoder(stack(config, attention), tied=False, max_positions=32768)


def stack(config: Config, attention: Attention) -> list[Layer]:
    """`attention` in every layer, with the window where that layer has one."""
    mlp = Mlp(size=config.size("intermediate_size"), activation=config.activation())
    return [Layer(attention=replace(attention, window=window), mlp=mlp) for window in _windows(config)]


def _windows(config: Config) -> list[int | None]:
    window = _window(config)
    kinds = layer_types(config)
    if kinds is None:
        first = _first_window_layer(config)
        return [window if index >= first else None for index in range(config.depth)]
    if window is None and "sliding_attention" in kinds:
        raise config.wrong(
            "layer_types names sliding_attention, which needs use_sliding_window true and a sliding_window"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _window(config: Config) -> int | None:
    switched_on = config.flag("use_sliding_window", False)
    if not switched_on or ("sliding_window" in config.values and not config.stated("sliding_window")):
        return None
    return config.size("sliding_window", 4096)


def _first_window_layer(config: Config) -> int:
    value = config.values.get("max_window_layers", 28)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise config.wrong(f"max_window_layers must be a whole number from 0, not {show(value)}")
    return value


def layer_types(config: Config) -> list[str] | None:
    """`layer_types` with one of full_attention and sliding_attention per layer, or None where not given."""
    kinds = config.entries("layer_types")
    if kinds is None:
        return None
    if len(kinds) != config.depth:
        raise config.wrong(
            f"layer_types has {len(kinds)} entries but num_hidden_layers is {config.depth}; make them agree"
        )
    named = ["full_attention" if kind == "attention" else kind for kind in kinds]
    for kind in named:
        if kind not in ("full_attention", "sliding_attention"):
            raise config.unsupported(f"layer type {show(kind)}; modelled: full_attention, sliding_attention")
    return named
