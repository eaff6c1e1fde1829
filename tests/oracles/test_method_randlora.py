"""RandLoRA against the traced PEFT model, and what it refuses."""

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
    ("qwen2", {**PACKED, "recompute": "full", "batching": "padded", "rank": 5}),
    ("llama", {**PLAIN, "rank": 5}),
    ("llama", {**AGAIN, "rank": 8, "set": {"method.randlora_dropout": 0.1}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "rank": 7, "set": {"method.bias": "all"}}),
    ("gemma", {**WIDE, "rank": 5}),
    ("phi3", {**PLAIN, "rank": 9}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_randlora_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "randlora", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.randlora_dropout": 1.0}}, "randlora_dropout=1.0"),
        ({"set": {"method.exclude_modules": "q_proj"}}, "has no such setting"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="randlora", **fields))
