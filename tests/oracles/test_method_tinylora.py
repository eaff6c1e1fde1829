"""TinyLoRA against the traced PEFT model, and what it refuses."""

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
    ("llama", {**PLAIN, "rank": 2, "set": {"method.u": 7}}),
    ("llama", {**AGAIN, "rank": 3, "set": {"method.tinylora_dropout": 0.1}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "rank": 3, "set": {"method.bias": "all"}}),
    ("gemma", {**WIDE, "rank": 2, "set": {"method.u": 3}}),
    ("qwen2", {**PLAIN, "rank": 4, "adapter_dtype": "bf16"}),
    ("phi3", {**PLAIN, "rank": 5}),
    ("llama", {**PLAIN, "set": {"method.u": 7, "method.weight_tying": 0.5}}),
    ("qwen2", {**AGAIN, "rank": 3, "set": {"method.weight_tying": 1.0}}),
    ("phi3", {**WIDE, "set": {"method.weight_tying": 0.3}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_tinylora_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "tinylora", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.weight_tying": 1.5}}, "weight_tying=1.5"),
        ({"set": {"method.u": 0}}, "u=0"),
        ({"format": "nf4"}, "integers cannot be parameters"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="tinylora", **fields))
