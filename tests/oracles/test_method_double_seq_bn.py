"""Houlsby adapters against the traced model of AdapterHub's library, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles import hub
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row

SMALL: dict[str, Any] = {"method.reduction_factor": 7}
OTHER: dict[str, Any] = {**SMALL, "method.dropout": 0.1, "method.non_linearity": "tanh"}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "method": "houlsby", "set": SMALL}),
    ("llama", {**AGAIN, "method": "double_seq_bn", "set": SMALL}),
    ("mistral", {**AGAIN, "method": "houlsby", "set": {"model.sliding_window": 9}}),
    ("mistral", {**MIXED, "method": "houlsby", "set": OTHER}),
    ("qwen2", {**AGAIN, "method": "houlsby", "set": SMALL}),
    ("mistral", {**PLAIN, "method": "double_seq_bn_inv"}),
    ("qwen2", {**WIDE, "method": "houlsby", "set": {**OTHER, "method.scaling": "learned"}}),
    ("llama", {**WIDE, "method": "houlsby", "grad_accum": 2, "set": {**SMALL, "method.leave_out": [1]}}),
    (
        "qwen3",
        {**PLAIN, "method": "houlsby", "set": {"method.residual_before_ln": False, "method.original_ln_before": True}},
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=hub.key)
def test_double_seq_bn_is_what_adapters_does(row: Row) -> None:
    hub.assert_as_recorded("double_seq_bn", row)


@pytest.mark.trainers
def test_the_records_are_what_adapters_does() -> None:
    assert hub.traced(ROWS)[0] == hub.recorded("double_seq_bn")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.reduction_factor": 0}}, "must be above 0"),
        ({"rank": 8}, "--rank means nothing"),
        ({"model": "qwen2.5-7b", "set": {"method.original_ln_after": False}}, "cannot leave out the residual"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(**{"model": "llama-7b", "method": "double_seq_bn", **fields}))
