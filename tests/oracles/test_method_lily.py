"""Lily against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "down_proj")
ROWS: list[Row] = [
    ("qwen2", {**PACKED, "recompute": "full", "batching": "padded", "rank": 4}),
    ("llama", {**PLAIN, "rank": 4}),
    ("llama", {**AGAIN, "rank": 3, "set": {"method.num_B": 4}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "rank": 3}),
    ("gemma", {**WIDE, "rank": 2, "set": {"method.num_B": 3}}),
    ("qwen2", {**PLAIN, "rank": 4, "adapter_dtype": "bf16"}),
    ("phi3", {**PLAIN, "rank": 5}),
    ("llama", {**PLAIN, "rank": 4, "set": {"method.stride_A": 2}}),
    ("qwen2", {**AGAIN, "rank": 3, "target_modules": ".*[qkv]_proj", "set": {"method.stride_A": 2}}),
    ("phi3", {**WIDE, "rank": 3, "target_modules": "all-linear", "set": {"method.stride_A": 3}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_lily_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "lily", "target_modules": targets, **fields})


@pytest.mark.parametrize("targets", [r".*\.(q|o)_proj", r".*\.(gate|down)_proj"])
def test_a_pattern_shares_by_shape(targets: str) -> None:
    assert_equal("llama", {**AGAIN, "method": "lily", "target_modules": targets, "rank": 3})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.stride_A": 0}}, "stride_A=0"),
        ({"set": {"method.num_B": 0}}, "num_B=0"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="lily", **fields))
