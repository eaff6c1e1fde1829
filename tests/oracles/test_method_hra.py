"""HRA against the traced PEFT model, and what it refuses."""

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
    ("llama", {**PLAIN, "rank": 2}),
    ("llama", {**AGAIN, "rank": 3}),
    ("qwen2", {**MIXED, "dtype": "bf16", "rank": 3, "set": {"method.bias": "hra_only"}}),
    ("qwen2", {**PLAIN, "rank": 3, "adapter_dtype": "bf16"}),
    ("gemma", {**WIDE, "rank": 2}),
    ("llama_biased", {**WIDE, "rank": 2, "set": {"method.bias": "all"}}),
    ("phi3", {**PLAIN, "rank": 2}),
    ("qwen2", {**MIXED, "dtype": "bf16", "rank": 3, "set": {"method.apply_GS": True}}),
    ("llama", {**AGAIN, "rank": 4, "set": {"method.apply_GS": True}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_hra_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "hra", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 5000}, "larger than the input of"),
        ({"format": "nf4"}, "not in the shape of one"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="hra", **fields))
