"""DeLoRA against the traced PEFT model, and what it refuses."""

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
ROWS: list[Row] = [
    ("llama", {**PLAIN, "rank": 4}),
    ("llama", {**AGAIN, "rank": 3, "set": {"method.module_dropout": 0.1}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "rank": 3, "set": {"method.bias": "delora_only"}}),
    ("gemma", {**WIDE, "rank": 2}),
    ("qwen2", {**PLAIN, "rank": 2, "adapter_dtype": "bf16"}),
    ("phi3", {**PLAIN, "rank": 2}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_delora_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "delora", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.module_dropout": 1.0}}, "module_dropout=1.0"),
        ({"set": {"method.rank_pattern": {"q_proj": 0}}}, "at least 1"),
        ({"format": "nf4"}, "norm of the weight"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="delora", **fields))
