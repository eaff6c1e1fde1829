"""Collectives of a step: what a rank sends, and how long links take."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.pipeline import estimate
from peftplan.result import Communication, Estimate

GB = 10**9


def _found(layout: str, **fields: Any) -> Estimate:
    asked = {"model": "llama-7b", "method": "full", "gpus": 8, "gpu": "a100-80gb", "seq_len": 512, "dtype": "bf16"}
    return estimate(**{**asked, "layout": layout, **fields})


def _sent(found: Estimate) -> dict[str, Communication]:
    return {one.collective: one for one in found.time.communication}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_fsdp_gathers_twice_and_reduces_once(recompute: str) -> None:
    """Layers for forward and again for backward, the root once; seven eighths come
    from others."""
    found = _found("fsdp", recompute=recompute)
    each = _sent(found)
    whole = 2 * found.parameters.total
    ends = 2 * (2 * 32000 * 4096 + 4096)
    assert each["all_gather"].sent_bytes == (2 * whole - ends) * 7 // 8
    assert each["reduce_scatter"].sent_bytes == whole * 7 // 8
    assert each["all_gather"].link == "NVLink"


def test_a_ring_sends_an_all_reduce_twice() -> None:
    found = _found("ddp")
    assert _sent(found)["all_reduce"].sent_bytes == pytest.approx(2 * 2 * found.parameters.total * 7 / 8, rel=1e-6)


def test_copies_of_shards_meet_over_the_network() -> None:
    found = _found("hsdp", nodes=2)
    assert {(one.collective, one.link) for one in found.time.communication} == {
        ("all_gather", "NVLink"), ("reduce_scatter", "NVLink"), ("all_reduce", "network"),
    }  # fmt: skip


def test_frozen_weights_send_no_gradients() -> None:
    full, lora = _sent(_found("fsdp")), _sent(_found("fsdp", method="lora"))
    assert lora["all_gather"].sent_bytes == pytest.approx(full["all_gather"].sent_bytes, rel=0.01)
    assert lora["reduce_scatter"].sent_bytes < full["reduce_scatter"].sent_bytes / 100


def test_time_is_all_replicas() -> None:
    one, eight = _found("fsdp", gpus=1), _found("fsdp")
    assert one.time.tokens_per_second is not None
    assert eight.time.tokens_per_second is not None
    assert 4 * one.time.tokens_per_second < eight.time.tokens_per_second
    assert one.time.communication == ()
    assert eight.time.breakdown is not None
    assert eight.time.step_seconds is not None
    parts = {key: value for key, value in eight.time.breakdown.items() if key != "communication"}
    assert sum(parts.values()) == pytest.approx(eight.time.step_seconds.expected)
