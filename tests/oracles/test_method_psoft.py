"""PSOFT against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "down_proj")
SERIES, TERMS, EPS = (
    f"method.{name}" for name in ("use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps")
)
AFTER, BEFORE, ORTH = (f"method.psoft_{name}" for name in ("mag_b", "mag_a", "orth"))
ROWS: list[Row] = [
    ("llama", {**PLAIN, "rank": 5}),
    ("llama_biased", {**AGAIN, "rank": 4, "set": {"method.psoft_dropout": 0.1, "method.psoft_svd": "lowrank"}}),
    ("llama", {**PLAIN, "rank": 5, "set": {SERIES: True, BEFORE: False}}),
    ("gemma", {**AGAIN, "rank": 5, "set": {SERIES: True, TERMS: 3, AFTER: False}}),
    ("gemma", {**WIDE, "rank": 3, "set": {ORTH: False}}),
    ("llama", {**PLAIN, "rank": 3, "set": {ORTH: False, BEFORE: False, AFTER: False}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "rank": 3}),
    ("qwen2", {**PLAIN, "adapter_dtype": "bf16", "rank": 3}),
    ("phi3", {**PLAIN, "rank": 5, "set": {SERIES: True, EPS: 0.9}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_psoft_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "psoft", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 5000}, "has only 4096 singular values"),
        ({"set": {"method.psoft_dropout": 1.0}}, "psoft_dropout=1.0"),
        ({"set": {SERIES: True, TERMS: 1}}, "at least 2"),
        ({"set": {SERIES: True, EPS: 1.5}}, "cayley_neumann_eps=1.5"),
        ({"format": "nf4"}, "PSOFT on 4-bit weights: PEFT takes"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="psoft", **fields))
