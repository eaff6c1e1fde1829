"""MiSS against the traced PEFT model, and what it refuses."""

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

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "down_proj")
ROWS: list[Row] = [
    ("llama", {**PLAIN, "rank": 4}),
    ("llama", {**PACKED, "rank": 5}),
    ("llama", {**PACKED, "rank": 4, "recompute": "full", "batching": "padded"}),
    ("llama", {**AGAIN, "rank": 5, "set": {"method.miss_dropout": 0.1}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "rank": 4, "set": {"method.bias": "MiSS_only"}}),
    ("gemma", {**WIDE, "rank": 5, "set": {"method.init_weights": "mini", "method.mini_r": 2}}),
    ("phi3", {**AGAIN, "rank": 48}),
    ("llama", {**PLAIN, "rank": 7, "adapter_dtype": "bf16"}),
    ("llama_biased", {**WIDE, "rank": 8, "set": {"method.init_weights": "bat"}}),
    ("qwen2", {**PACKED, "format": "int8", "rank": 4, "set": {"method.init_weights": "bat"}}),
    ("llama", {**AGAIN, "rank": 8, "set": {"method.init_weights": "bat"}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_miss_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "miss", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 5000}, "larger than the input of self_attn.q_proj"),
        ({"rank": 48, "set": {"method.init_weights": "bat"}}, "does not divide both sides"),
        ({"set": {"method.init_weights": "mini", "method.mini_r": 3}}, "mini_r=3 does not divide"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="miss", **fields))
