"""GraLoRA against the traced PEFT model, and what it refuses."""

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
    ("llama", {**AGAIN, "rank": 6, "set": {"method.gralora_dropout": 0.1, "method.hybrid_r": 3}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "rank": 4, "set": {"method.bias": "all", "method.hybrid_r": 3}}),
    ("gemma", {**WIDE, "rank": 2}),
    ("qwen2", {**PLAIN, "rank": 8, "adapter_dtype": "bf16", "set": {"method.gralora_k": 4}}),
    ("phi3", {**PLAIN, "rank": 3, "set": {"method.gralora_k": 1}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_gralora_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "gralora", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 5}, "multiple of method.gralora_k=2"),
        ({"rank": 3, "set": {"method.gralora_k": 3}}, "does not divide the sides"),
        ({"set": {"method.exclude_modules": "q_proj"}}, "has no such setting"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="gralora", **fields))
