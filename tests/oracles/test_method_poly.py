"""Poly against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import MIXED, PACKED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "down_proj")
SPLIT = {"method.n_splits": 2, "method.n_tasks": 3}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "rank": 4}),
    ("llama", {**WIDE, "rank": 3, "set": SPLIT}),
    ("qwen2", {**MIXED, "dtype": "bf16", "rank": 4, "set": {"method.n_skills": 1}}),
    ("qwen2", {**PLAIN, "rank": 6, "adapter_dtype": "bf16", "set": SPLIT}),
    ("gemma", {**WIDE, "rank": 5}),
    ("phi3", {**PLAIN, "rank": 9, "set": SPLIT}),
    ("phi3", {**PLAIN, "rank": 4, "set": {"model.use_cache": False}}),
    ("llama", {**PLAIN, "rank": 4, "target_modules": ("q_proj", "lm_head")}),
    ("llama", {**PACKED, "rank": 4}),
    ("llama", {**PACKED, "format": "int8", "rank": 4}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_poly_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "poly", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.n_skills": 0}}, "n_skills=0: must be at least 1"),
        ({"set": {"method.n_splits": 3}}, "n_splits=3 does not divide both sides"),
        ({"set": {"method.layers_to_transform": [0]}}, "has no such setting"),
        ({"recompute": "full"}, "gradient checkpointing"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="poly", **fields))
