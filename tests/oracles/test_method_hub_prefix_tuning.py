"""AdapterHub's prefix tuning against the traced model of its library, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles import hub
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row

NARROW: dict[str, Any] = {"method.prefix_length": 5, "method.bottleneck_size": 11}
FLAT: dict[str, Any] = {"method.flat": True, "method.prefix_length": 7}
ROWS: list[Row] = [
    (family, {"method": "hub_prefix_tuning", **fields})
    for family, fields in (
        ("llama", {**PLAIN, "set": NARROW}),
        ("llama", {**PLAIN, "set": FLAT}),
        ("llama", {**WIDE, "set": {**NARROW, "method.dropout": 0.1, "method.non_linearity": "relu"}}),
        ("llama", {**AGAIN, "set": NARROW}),
        ("llama", {**AGAIN, "set": FLAT}),
        ("llama", {**MIXED, "set": NARROW}),
        ("llama", {**MIXED, "set": FLAT}),
        ("llama_biased", {**WIDE, "attention": "eager", "set": NARROW}),
        ("llama", {**WIDE, "attention": "sdpa_math", "set": FLAT}),
        ("mistral", {**WIDE, "set": {**NARROW, "model.sliding_window": 9}}),
        ("llama", {**PLAIN, "set": {**NARROW, "method.use_gating": True}}),
        ("mistral", {**AGAIN, "set": {**NARROW, "method.use_gating": True}}),
        ("llama", {**AGAIN, "set": {**FLAT, "method.use_gating": True, "method.shared_gating": False}}),
    )
]


@pytest.mark.parametrize("row", ROWS, ids=hub.key)
def test_hub_prefix_tuning_is_what_adapters_does(row: Row) -> None:
    hub.assert_as_recorded("hub_prefix_tuning", row)


@pytest.mark.trainers
def test_the_records_are_what_adapters_does() -> None:
    assert hub.traced(ROWS)[0] == hub.recorded("hub_prefix_tuning")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "qwen2.5-7b"}, "no prefix tuning for qwen2"),
        ({"set": {"method.prefix_length": 0}}, "must be at least 1"),
        ({"set": {"method.bottleneck_size": 0}}, "must be at least 1"),
        ({"set": {"method.leave_out": [1]}}, "leave_out of a prefix"),
        ({"set": {"method.non_linearity": "mish"}}, "is not modelled; use one of"),
        ({"batching": "packed"}, "packed behind a prefix"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(**{"model": "llama-7b", "method": "hub_prefix_tuning", **fields}))
