"""SHiRA against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "down_proj")
ROWS: list[Row] = [
    ("llama", {**PLAIN, "rank": 3}),
    ("llama_biased", {**AGAIN, "rank": 4, "set": {"method.modules_to_save": ["lm_head"]}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "rank": 3}),
    ("gemma", {**WIDE, "rank": 3}),
    ("qwen2", {**PLAIN, "adapter_dtype": "bf16", "rank": 2}),
    ("phi3", {**PLAIN, "rank": 5}),
    ("llama", {**PACKED, "rank": 3, "set": {"format.prepare": False}}),
    ("llama", {**PACKED, "format": "int8", "rank": 3}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_shira_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "shira", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 2049}, "are more than self_attn.q_proj has"),
        ({"set": {"method.exclude_modules": "q_proj"}}, "has no such setting"),
        ({"format": "nf4"}, "float32 by float16 in .* set format.prepare=false"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="shira", **fields))
