"""Multitask prompt tuning against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

N: dict[str, Any] = {"method.num_virtual_tokens": 5}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": N}),
    ("llama", {**AGAIN, "set": {**N, "method.num_tasks": 3}}),
    ("qwen2", {**MIXED, "set": {**N, "method.num_ranks": 2}}),
    ("gemma", {**WIDE, "set": N}),
    ("gemma", {**AGAIN, "set": {**N, "method.num_tasks": 2}}),
    ("phi3", {**PLAIN, "micro_batch": 1, "set": N}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_multitask_prompt_tuning_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "multitask_prompt_tuning", **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "num_virtual_tokens=None"),
        ({"set": {"method.num_virtual_tokens": 4, "method.num_tasks": 0}}, "use at least 1 of each"),
        ({"set": {"method.num_virtual_tokens": 4}, "batching": "packed"}, "PEFT drops position_ids"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="multitask_prompt_tuning", **fields))
