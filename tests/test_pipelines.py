"""Pipelines: what each rank holds, and what the whole stays."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import Estimate, estimate
from peftplan.errors import RequestError
from tests.conformance import zoo

FIELDS: dict[str, Any] = {
    "target_modules": ("q_proj", "down_proj"), "micro_batch": 2, "seq_len": 16, "grad_accum": 6, "batching": "exact",
    "set": {"model.num_hidden_layers": 8, "model.use_cache": False},
}  # fmt: skip


def on(layout: str | None, gpus: int = 1, **fields: Any) -> Estimate:
    given = {**FIELDS, **fields, "layout": layout, "gpus": gpus}
    given["set"] = {**FIELDS["set"], **fields.get("set", {})}
    if given.get("method") == "full":
        del given["target_modules"]
    return estimate(zoo.job("grouped", {"method": "lora", **given}))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_one_stage_is_no_pipeline(method: str) -> None:
    assert on("pp=1", method=method).memory == on(None, method=method).memory


@pytest.mark.parametrize(("layout", "gpus"), [("pp=2", 2), ("pp=4", 4), ("pp=4,vpp=2", 4), ("pp=8", 8)])
def test_the_model_is_the_same_and_a_rank_holds_less(layout: str, gpus: int) -> None:
    alone, spread = on(None, method="full"), on(layout, gpus, method="full")
    assert spread.parameters == alone.parameters
    assert spread.flops == alone.flops
    assert len(spread.memory.per_rank) == gpus
    assert max(rank.peak_bytes for rank in spread.memory.per_rank) == spread.memory.peak_bytes < alone.memory.peak_bytes
    assert sum(spread.memory.at_peak.values()) == spread.memory.peak_bytes


def test_earlier_stages_hold_more_micro_batches() -> None:
    peaks = [rank.peak_bytes for rank in on("pp=8", 8, grad_accum=16).memory.per_rank[1:-1]]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


def test_gpipe_holds_all_of_them() -> None:
    by_schedule = {
        schedule: on("pp=4", 4, grad_accum=12, set={"layout.schedule": schedule}).memory.peak_bytes
        for schedule in ("1f1b", "gpipe")
    }
    assert by_schedule["gpipe"] > by_schedule["1f1b"]


def test_more_micro_batches_than_stages_change_buffers_only() -> None:
    few, many = (on("pp=4", 4, grad_accum=n) for n in (8, 64))
    hidden, tokens = 2 * 16 * 48 * 2, 2 * 512  # bf16; ids and labels, each in a block of the allocator
    longer = many.memory.per_rank[1].peak_bytes - few.memory.per_rank[1].peak_bytes
    assert longer == (64 - 8) * (2 * hidden + tokens)


def test_layers_that_do_not_divide_are_refused_or_spread() -> None:
    with pytest.raises(RequestError, match="pp=3 does not divide the number of layers, 8; use 1 or 2 or 4, or set"):
        on("pp=3", 3)
    uneven = on("pp=3", 3, set={"layout.uneven": True})
    assert len(uneven.memory.per_rank) == 3


@pytest.mark.parametrize("method", ["adalora", "prefix_tuning"])
def test_what_spans_all_layers_is_refused(method: str) -> None:
    extra = {"method.num_virtual_tokens": 4} if method == "prefix_tuning" else {"method.total_step": 100}
    fields = {k: v for k, v in FIELDS.items() if k != "target_modules"}
    given = {**fields, "method": method, "layout": "pp=2", "gpus": 2, "set": {**FIELDS["set"], **extra}}
    job = zoo.job("grouped", given)
    with pytest.raises(RequestError, match="--layout pp: this method"):
        estimate(job)


@pytest.mark.parametrize(("layout", "gpus"), [("pp=4", 4), ("pp=2,dp=2", 4), ("pp=2,vpp=2", 2), ("tp=2,pp=2", 4)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_no_less_is_reserved_than_allocated(layout: str, gpus: int, method: str) -> None:
    memory = on(layout, gpus, method=method, target_modules=("q_proj",)).memory
    assert memory.reserved_bytes is not None
    assert memory.reserved_bytes >= memory.peak_bytes


def test_ranks_that_share_layers_and_stages_are_of_one_model() -> None:
    alone, spread = on(None, method="full"), on("tp=2,pp=2", 4, method="full")
    assert spread.parameters == alone.parameters
    assert spread.flops == alone.flops


def test_layers_that_hand_no_gradient_on_are_looked_at_where_the_loss_is() -> None:
    cut = {"format.activations": "dynamic"}
    given = {**FIELDS, "method": "lora", "target_modules": "all-linear", "format": "torchao_int8"}
    job = zoo.job("grouped", {**given, "layout": "pp=2", "gpus": 2, "set": {**FIELDS["set"], **cut}})
    assert len(estimate(job).memory.per_rank) == 2
