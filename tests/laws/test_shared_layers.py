"""Laws of ranks that share matrices: parts make a whole, one rank is no layout, more ranks never need more."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftplan.graph.core import ADAPTER
from peftplan.job import Job, make_job
from peftplan.pipeline import Reading, read

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 2, "settings": {"method.target_modules": "all-linear"}},
}


def _job(heads: int, width: int, fields: dict[str, Any]) -> Job:
    config = {
        "model_type": "llama", "hidden_size": 8 * heads, "intermediate_size": width, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 96, "head_dim": 8,
        "max_position_embeddings": 64,
    }  # fmt: skip
    plain = {"precision": "bf16", "batching": "exact", "recompute": "none", "micro_batch": 2, "seq_len": 16}
    return make_job(model="tiny", config=config, backend="cpu", **plain, **fields)


def _read(heads: int, width: int, method: str, layout: str) -> Reading:
    return read(_job(heads, width, {**METHODS[method], "layout": layout}))


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_is_no_layout(method: str) -> None:
    assert _read(8, 64, method, "tp=1").estimate.memory == _read(8, 64, method, "none").estimate.memory


@settings(max_examples=12, deadline=None)
@given(st.sampled_from((2, 4, 8)), st.sampled_from(sorted(METHODS)), st.integers(1, 5))
def test_parts_make_the_whole(tp: int, method: str, times: int) -> None:
    """What is split sums to the whole weight, what is not is the same on every rank; counts do not change."""
    whole, part = _read(8, 8 * times, method, "none"), _read(8, 8 * times, method, f"tp={tp}")
    assert part.estimate.parameters == whole.estimate.parameters
    assert part.estimate.flops == whole.estimate.flops
    ours = {t.name: t for t, _ in part.graph.params()}
    for t, _ in whole.graph.params():
        held = ours[t.name].numel
        assert held in (t.numel, t.numel // tp)
        if t.kind != ADAPTER and len(t.shape) == 2:
            assert held * tp == t.numel


@settings(max_examples=12, deadline=None)
@given(st.sampled_from((2, 4)), st.sampled_from(sorted(METHODS)), st.integers(1, 5))
def test_more_ranks_need_no_more_but_for_what_they_send(tp: int, method: str, times: int) -> None:
    """The copies that collectives make: of logits, which every rank gathers, and of a layer's hidden state."""
    fewer, more = _read(8, 8 * times, method, f"tp={tp}"), _read(8, 8 * times, method, f"tp={2 * tp}")
    assert more.static["weight"] < fewer.static["weight"]
    assert more.estimate.memory.saved_for_backward_bytes <= fewer.estimate.memory.saved_for_backward_bytes
    assert more.estimate.memory.peak_bytes <= fewer.estimate.memory.peak_bytes
