"""VeRA against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

DROPPED = {"method.vera_dropout": 0.1}
ONE: dict[str, Any] = {
    "target_modules": "q_proj,down_proj",
    "set": {"method.layers_to_transform": [1], "method.bias": "vera_only"},
}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": DROPPED}),
    ("llama", {**AGAIN, "set": {"method.modules_to_save": ["lm_head"]}}),
    ("llama", {**PACKED, "format": "int8"}),
    ("llama_biased", {**WIDE, **ONE}),
    ("qwen2", {**PACKED, "set": {**DROPPED, "method.bias": "all"}}),
    ("qwen2", {**MIXED, "dtype": "bf16"}),
    ("gemma", AGAIN),
    ("phi3", PLAIN),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_vera_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "vera", "rank": 5, "target_modules": "all-linear", **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.vera_dropout": 1}}, "below 1"),
        ({"precision": "bf16-mixed", "dtype": "fp32", "target_modules": "lm_head"}, "float32 in place of bfloat16"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", **{"method": "vera", "rank": 5, "target_modules": "all-linear", **fields}))
