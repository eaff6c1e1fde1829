"""What ranks that share layers send each other in a step."""

from __future__ import annotations

from typing import Any

from peftplan.job import make_job
from peftplan.pipeline import read
from peftplan.result import Communication

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "method": "full", "precision": "bf16", "batching": "exact", "recompute": "none", "micro_batch": 2, "seq_len": 16,
    "gpu": "a100-80gb",
}  # fmt: skip


def _sent(layout: str, **fields: Any) -> dict[str, Communication]:
    time = read(make_job(model="tiny", config=CONFIG, layout=layout, **{**PLAIN, **fields})).estimate.time
    return {one.collective: one for one in time.communication}


def test_transformers_sums_twice_a_layer_forward_and_five_times_back() -> None:
    """Output and down projections forward, with the embedding; q, k, v, gate and up backward, with the head."""
    found = _sent("tp=2")
    hidden = 2 * 16 * 64 * 2
    assert found["all_reduce"].calls == 3 * (2 + 5) + 2
    assert found["all_reduce"].sent_bytes == found["all_reduce"].calls * hidden
    assert found["all_gather"].calls == 1
    assert found["all_gather"].sent_bytes == 2 * 16 * 96 * 2 // 2


def test_layers_that_run_again_send_again() -> None:
    once, twice = _sent("tp=2"), _sent("tp=2", recompute="full")
    assert twice["all_reduce"].calls == once["all_reduce"].calls + 3 * 2


def test_megatron_gathers_and_scatters_tokens() -> None:
    found = _sent("zero1,tp=2,sp", settings={"layout.framework": "megatron"})
    assert found["reduce_scatter"].calls == 3 * (2 + 2) + 1
    assert found["all_gather"].calls == 3 * (2 + 4) + 1


def test_more_micro_batches_send_more() -> None:
    assert _sent("tp=2", grad_accum=4)["all_reduce"].calls == 4 * _sent("tp=2")["all_reduce"].calls
