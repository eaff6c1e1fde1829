"""Megatron-Core on TransformerEngine: held to measured runs, as it cannot be traced."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import RequestError, Unsupported
from peftplan.job import Job, make_job
from peftplan.pipeline import read

LLAMA_70B_12_LAYERS: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 12,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "tie_word_embeddings": False, "max_position_embeddings": 131072,
}  # fmt: skip
MEASURED = {
    ("zero1,dp=4,tp=2,sp", 4096): 62136,
    ("zero1,dp=2,tp=4,sp", 4096): 40010,
    ("zero1,tp=8,sp", 4096): 28965.365,
    ("zero1,dp=4,pp=2", 4096): 68149.199,
    ("zero1,tp=2,sp,ulysses=4", 32768): 70070.563,
    ("zero1,ulysses=8", 131072): 151539.399,
}
"""(layout, tokens) -> MiB: torch's max_memory_allocated of the fullest of 8 B200, Megatron-LM 23e00ed0, TE 2.11, torch
2.10 (MooreThreads/SimuMax at 4dcaae5, docs/b200, 2026-04)."""


def _job(layout: str, **fields: Any) -> Job:
    plain: dict[str, Any] = {
        "method": "full", "precision": "bf16", "micro_batch": 1, "batching": "exact", "recompute": "none",
        "gpu": "b200", "gpus": 8, "seq_len": 4096, "grad_accum": 4,
        "settings": {"layout.framework": "megatron", "loop.outputs_until": "loss"},
    }  # fmt: skip
    return make_job(model="llama-3-70b", config=LLAMA_70B_12_LAYERS, layout=layout, **{**plain, **fields})


@pytest.mark.parametrize(("layout", "tokens"), MEASURED)
def test_a_rank_holds_what_was_measured(layout: str, tokens: int) -> None:
    found = read(_job(layout, seq_len=tokens)).estimate.memory
    assert found.peak_bytes / 2**20 == pytest.approx(MEASURED[layout, tokens], rel=0.002)


def test_counts_are_those_of_the_whole_model() -> None:
    one = read(_job("zero1,tp=8,sp")).estimate
    other = read(_job("zero1,dp=2,tp=4,sp")).estimate
    assert one.parameters == other.parameters
    assert one.flops == other.flops


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"method": "lora"}, "full fine-tuning alone"),
        ({"precision": "fp32"}, "in bf16 alone"),
        ({"layout": "fsdp,tp=4,sp"}, "with fsdp2 is not modelled"),
        ({"layout": "zero1,tp=4,sp,ring=2"}, "with ring attention"),
        ({"optimizer": "sgd"}, "its Adam alone"),
        ({"layout": "tp=8,sp", "grad_accum": 1, "batching": "packed", "micro_batch": 2}, "packed rows"),
    ],
)
def test_what_is_not_modelled_is_said(fields: dict[str, Any], why: str) -> None:
    given = {"layout": "zero1,tp=8,sp", **fields}
    with pytest.raises((RequestError, Unsupported), match=why):
        read(_job(**given))
