"""Compacter against the traced model of AdapterHub's library, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles import hub
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row

FITS: dict[str, Any] = {"method.reduction_factor": 4}
OTHER: dict[str, Any] = {"method.reduction_factor": 2, "method.phm_dim": 2, "method.phm_rank": 3}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "method": "compacter", "set": FITS}),
    ("llama", {**AGAIN, "method": "compacter", "set": FITS}),
    ("llama", {**MIXED, "method": "compacter", "set": OTHER}),
    ("qwen2", {**WIDE, "method": "compacter++", "set": OTHER}),
    ("mistral", {**PLAIN, "method": "compacter++", "set": {**FITS, "method.factorized_phm_rule": True}}),
    ("llama", {**WIDE, "method": "compacter_plus_plus", "set": {**FITS, "method.shared_W_phm": True}}),
    ("qwen2", {**PLAIN, "method": "compacter", "set": {**FITS, "method.shared_phm_rule": False}}),
    (
        "qwen3",
        {**WIDE, "method": "compacter++", "set": {**FITS, "method.factorized_phm_W": False, "method.phm_bias": False}},
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=hub.key)
def test_compacter_is_what_adapters_does(row: Row) -> None:
    hub.assert_as_recorded("compacter", row)


@pytest.mark.trainers
def test_the_records_are_what_adapters_does() -> None:
    assert hub.traced(ROWS)[0] == hub.recorded("compacter")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.reduction_factor": 700}}, "a multiple of 4 fits"),
        ({"set": {"method.phm_dim": 0}}, "must be at least 1"),
        ({"set": {"method.shared_W_phm": True, "method.factorized_phm_W": False}}, "shares only factors"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(**{"model": "llama-7b", "method": "compacter", **fields}))
