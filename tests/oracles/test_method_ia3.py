"""IA3 against the traced PEFT model, and what it refuses."""

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

ALL: dict[str, Any] = {"target_modules": "q_proj,o_proj,gate_proj,down_proj"}
BOTH = {"method.feedforward_modules": ["down_proj", "o_proj"]}
FUSED: dict[str, Any] = {
    "target_modules": "qkv_proj,down_proj",
    "set": {"method.feedforward_modules": ["down_proj"]},
}
ROWS: list[Row] = [
    ("llama", PLAIN),
    ("llama", {**PACKED, **ALL, "set": BOTH}),
    ("llama", {**AGAIN, **ALL, "set": {**BOTH, "method.modules_to_save": ["lm_head"]}}),
    ("qwen2", {**MIXED, **ALL, "set": BOTH}),
    ("qwen2", WIDE),
    ("gemma", AGAIN),
    ("phi3", {**AGAIN, **FUSED}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_ia3_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "ia3", **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_modules": "qkv_proj"}, "no default feedforward_modules for phi3"),
        ({"target_modules": ("qkv_proj",), "set": {"method.feedforward_modules": ["down_proj"]}}, "'down_proj' is not"),
        ({"rank": 4}, "r"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="phi-3-mini", method="ia3", **fields))
