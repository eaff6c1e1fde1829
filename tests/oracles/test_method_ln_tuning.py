"""LN tuning against the traced PEFT model, and what it refuses."""

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

NORMS: dict[str, Any] = {"target_modules": "input_layernorm,post_attention_layernorm,norm"}
SOME: dict[str, Any] = {"target_modules": "norm,layers.1.input_layernorm"}
ROWS: list[Row] = [
    ("llama", PLAIN),
    ("llama", {**AGAIN, **SOME}),
    ("llama", {**PACKED, "set": {"method.modules_to_save": ["lm_head"]}}),
    ("qwen2", {**MIXED, **NORMS}),
    ("qwen2", {**WIDE, **NORMS}),
    ("gemma", AGAIN),
    ("phi3", {**PLAIN, **NORMS}),
    ("qwen2", PLAIN),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_ln_tuning_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "ln_tuning", **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "no default norms for phi3"),
        ({"target_modules": "q_norm"}, "matches no norm"),
        ({"target_modules": "all-linear"}, "linear layers"),
        ({"target_modules": "norm,o_proj"}, "o_proj is not modelled"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="phi-3-mini", **{"method": "ln_tuning", **fields}))
