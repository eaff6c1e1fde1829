"""Parallel adapters against the traced model of AdapterHub's library, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles import hub
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row

BESIDE: dict[str, Any] = {"method.mh_adapter": True, "method.reduction_factor": 5}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "method": "parallel"}),
    ("llama", {**MIXED, "method": "par_bn", "set": {**BESIDE, "method.dropout": 0.1}}),
    ("llama", {**AGAIN, "method": "parallel", "set": BESIDE}),
    ("mistral", {**WIDE, "method": "scaled_parallel", "set": BESIDE}),
    ("qwen3", {**AGAIN, "method": "parallel"}),
    ("qwen2", {**PLAIN, "method": "parallel", "set": BESIDE}),
    ("qwen3", {**WIDE, "method": "scaled_par_bn", "set": {"method.leave_out": [2]}}),
]


@pytest.mark.parametrize("row", ROWS, ids=hub.key)
def test_par_bn_is_what_adapters_does(row: Row) -> None:
    hub.assert_as_recorded("par_bn", row)


@pytest.mark.trainers
def test_the_records_are_what_adapters_does() -> None:
    assert hub.traced(ROWS)[0] == hub.recorded("par_bn")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"precision": "bf16-mixed", "dtype": "bf16", "set": {"method.scaling": "learned"}},
            "hidden states float32 in place of",
        ),
        ({"set": {"method.scaling": "often"}}, "scaling"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(**{"model": "llama-7b", "method": "par_bn", **fields}))
