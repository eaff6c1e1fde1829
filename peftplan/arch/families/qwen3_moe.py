"""Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder.

Mirrors transformers 5.23.0 models/qwen3_moe: Qwen3's attention (`head_dim` is hidden_size / heads where not stated);
experts without a shared one; some layers may be dense. With `use_sliding_window` every layer has the window.
"""

from __future__ import annotations

from peftplan.arch.config import Config
from peftplan.arch.core import Arch, Attention, Experts, Layer, Mlp
from peftplan.arch.families import _experts

MODEL_TYPES = ("qwen3_moe",)
KEYS = (
    *_experts.KEYS,
    "attention_bias",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "norm_topk_prob",
)


def read(config: Config) -> Arch:
    attention, dense, experts = _attention(config), _dense(config), _feed_forward(config)
    sparse = _experts.sparse_layers(config)
    layers = [Layer(attention=attention, mlp=experts if has_experts else dense) for has_experts in sparse]
    return config.decoder(layers, tied=False, max_positions=32768, returns_cache=True)


def _attention(config: Config) -> Attention:
    bias = config.flag("attention_bias", False)
    return Attention(
        heads=config.heads,
        kv_heads=config.kv_heads(4),
        head_dim=config.head_dim(),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        rotary_dim=config.head_dim(),
        window=_window(config),
        dropout=config.probability("attention_dropout"),
    )


def _window(config: Config) -> int | None:
    switched_on = config.flag("use_sliding_window", False)
    if not switched_on or ("sliding_window" in config.values and not config.stated("sliding_window")):
        return None
    return config.size("sliding_window", 4096)


def _dense(config: Config) -> Mlp:
    return Mlp(size=config.size("intermediate_size"), activation=config.activation())


def _feed_forward(config: Config) -> Experts:
    number = config.size("num_local_experts" if config.stated("num_local_experts") else "num_experts", 128)
    return Experts(
        number=number,
        top_k=_experts.top_k(config, 8, of=number),
        size=config.size("moe_intermediate_size", 768),
        activation=config.activation(),
        normalized=config.flag("norm_topk_prob", False),
        implementation=_experts.implementation(config),
    )
