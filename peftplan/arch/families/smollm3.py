"""SmolLM3.

Mirrors transformers 5.23.0 models/smollm3: a Llama whose every fourth layer (`no_rope_layer_interval`, or a 0
in `no_rope_layers`) rotates nothing; tied. A sliding window, where switched on, is on the layers that
`layer_types` names, else on those without rotation.
"""

from __future__ import annotations

from dataclasses import replace

from peftplan.arch.config import Config, show
from peftplan.arch.core import Arch, Attention, Layer, Mlp
from peftplan.arch.families.qwen2 import layer_types

MODEL_TYPES = ("smollm3",)
KEYS = (
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "sliding_window",
    "layer_types",
    "no_rope_layers",
    "no_rope_layer_interval",
)


def read(config: Config) -> Arch:
    attention, mlp = _attention(config), _mlp(config)
    layers = [
        Layer(
            attention=replace(attention, rotary_dim=attention.head_dim if rotates else None, window=window),
            mlp=mlp,
        )
        for rotates, window in zip(_rotates(config), _windows(config), strict=True)
    ]
    return config.decoder(layers, tied=True, max_positions=32768)


def _attention(config: Config) -> Attention:
    bias = config.flag("attention_bias", False)
    return Attention(
        heads=config.heads,
        kv_heads=config.kv_heads(4),
        head_dim=config.head_dim(),
        qkv_bias=bias,
        out_bias=bias,
        dropout=config.probability("attention_dropout"),
    )


def _mlp(config: Config) -> Mlp:
    return Mlp(
        size=config.size("intermediate_size"),
        activation=config.activation(),
        bias=config.flag("mlp_bias", False),
    )


def _rotates(config: Config) -> list[bool]:
    marks = config.entries("no_rope_layers")
    if marks is None:
        interval = config.size("no_rope_layer_interval", 4)
        return [(index + 1) % interval != 0 for index in range(config.depth)]
    if len(marks) < config.depth or any(mark not in (0, 1) for mark in marks):
        raise config.wrong(
            f"no_rope_layers must hold a 0 or a 1 for each of the {config.depth} layers, not {show(marks)}"
        )
    return [bool(mark) for mark in marks[: config.depth]]


def _windows(config: Config) -> list[int | None]:
    kinds = layer_types(config)
    switched_on = config.flag("use_sliding_window", False) and config.stated("sliding_window")
    window = config.size("sliding_window") if switched_on else None
    if kinds is None:
        return [None if rotates else window for rotates in _rotates(config)]
    if window is None and "sliding_attention" in kinds:
        raise config.wrong(
            "layer_types names sliding_attention, which needs use_sliding_window true and a sliding_window"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]
