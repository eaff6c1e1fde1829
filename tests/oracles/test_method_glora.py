"""GLoRA against the traced PEFT model, and what it refuses."""

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
    ("llama", {**AGAIN, "rank": 3, "set": {"method.config_A_B": "vector"}}),
    ("llama", {**MIXED, "dtype": "bf16", "rank": 3}),
    ("gemma", {**WIDE, "rank": 2}),
    ("phi3", {**PLAIN, "rank": 5}),
    ("qwen2", {**MIXED, "dtype": "bf16", "set": {"method.config_C": "vector", "method.config_D_E": "vector"}}),
    ("llama_biased", {**AGAIN, "set": {"method.config_C": "none", "method.config_D_E": "none"}}),
    ("llama_biased", {**PLAIN, "rank": 3}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_glora_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "glora", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.exclude_modules": "q_proj"}}, "has no such setting"),
        ({"format": "nf4"}, "plain torch.nn.Linear only"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="glora", **fields))
