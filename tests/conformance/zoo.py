"""Tiny models of every shape that peftplan knows, and the jobs that put a plug-in on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peftplan.job import Job, make_job

_SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {"model_type": "llama"},
    "tied with biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "round": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
    },
    "window": {"model_type": "mistral", "sliding_window": 9, "head_dim": 16},
    "normed heads": {"model_type": "qwen3", "head_dim": 16},
    "scaled embedding": {"model_type": "gemma", "head_dim": 16},
    "fused": {"model_type": "phi3"},
    "layers without rotary": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
}


def settings(kind: str, example: Any) -> dict[str, Any]:
    """What a user would set to get `example`: its fields that are not the defaults, as `kind.field`."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(example):
        made = field.default_factory() if callable(field.default_factory) else field.default
        value = getattr(example, field.name)
        if value != made:
            changed[f"{kind}.{field.name}"] = value
    return changed


def job(model: str, asked: Mapping[str, Any]) -> Job:
    """A job on one of MODELS."""
    config = {**_SIZES, **MODELS[model]}
    fields = {"model": model, "config": config, "method": "full", "micro_batch": 3, "seq_len": 17, **asked}
    return make_job(**fields)
