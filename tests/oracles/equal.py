"""Holding an estimate against the traced model: the same numbers, to the byte."""

from __future__ import annotations

from typing import Any

from peftplan.instruments.trace import Trace, trace
from peftplan.job import Job, make_job
from peftplan.pipeline import read
from peftplan.result import Estimate

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"head_dim": 16},
    "phi3": {"pad_token_id": 0},
    "mistral": {"sliding_window": 9},
    "granite": {"attention_bias": True, "residual_multiplier": 0.22, "logits_scaling": 8.0},
    "deepseek_v3": {
        "num_key_value_heads": 6,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
    },
    "qwen3_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
}
"""What each tiny model's config says besides `SIZES`: awkward on purpose, so that wrong dimensions cannot hide."""

Row = tuple[str, dict[str, Any]]
"""A model's name and the fields of the job."""


def assert_equal(family: str, fields: dict[str, Any], **changes: Any) -> None:
    """Parameters, bytes kept for backward, FLOPs and peak: predicted and traced are the same numbers."""
    job = tiny_job(family, fields, **changes)
    assert_same(trace(job), read(job).estimate)


def tiny_job(family: str, fields: dict[str, Any], **changes: Any) -> Job:
    """A job on one of the tiny models, with `changes` in its config."""
    config = {"model_type": family, **SIZES, **OWN[family], **changes}
    return make_job(model=family, config=config, **{**COMMON, **fields})


def assert_same(real: Trace, guess: Estimate) -> None:
    """Predicted and traced are the same numbers."""
    assert predicted(guess) == traced(real)


def predicted(guess: Estimate) -> dict[str, int]:
    """What of an estimate must be equal."""
    return {
        "total": guess.parameters.total,
        "trainable": guess.parameters.trainable,
        "stored": guess.parameters.stored_bytes,
        "static": guess.memory.static_bytes,
        "saved": guess.memory.saved_for_backward_bytes,
        **{kind: getattr(guess.flops, kind) for kind in ("forward", "backward", "recompute")},
        "peak": guess.memory.peak_bytes,
    }


def traced(real: Trace) -> dict[str, int]:
    """The same of a trace."""
    return {
        "total": real.parameters["total"],
        "trainable": real.parameters["trainable"],
        "stored": real.parameters["stored_bytes"],
        "static": real.static_bytes,
        "saved": real.saved_for_backward_bytes,
        **{kind: real.flops[kind] for kind in ("forward", "backward", "recompute")},
        "peak": real.peak_bytes,
    }


COMMON: dict[str, Any] = {"micro_batch": 3, "seq_len": 17, "backend": "cpu", "attention": "sdpa"}
PLAIN: dict[str, Any] = {"precision": "bf16", "batching": "exact", "recompute": "none"}
WIDE: dict[str, Any] = {"precision": "fp32", "batching": "padded", "recompute": "none"}
AGAIN: dict[str, Any] = {"precision": "bf16", "batching": "padded", "recompute": "full"}
MIXED: dict[str, Any] = {**PLAIN, "precision": "bf16-mixed"}
PACKED: dict[str, Any] = {**PLAIN, "format": "nf4", "dtype": "bf16"}


def name(row: object) -> str | None:
    """A readable test id."""
    return row if isinstance(row, str) else None
