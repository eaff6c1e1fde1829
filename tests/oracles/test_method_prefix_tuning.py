"""Prefix tuning against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import MIXED, PACKED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

TOKENS: dict[str, Any] = {"method.num_virtual_tokens": 5}
PROJECTED = {**TOKENS, "method.prefix_projection": True, "method.encoder_hidden_size": 21}
NO_CACHE = {"model.use_cache": False}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": TOKENS}),
    ("llama", {**WIDE, "set": {**PROJECTED, **NO_CACHE}}),
    ("llama", {**PACKED, "set": TOKENS}),
    ("llama", {**PLAIN, "set": {**TOKENS, **NO_CACHE, "loop.outputs_until": "loss"}}),
    ("qwen2", {**MIXED, "set": {**PROJECTED, **NO_CACHE}}),
    ("gemma", {**PLAIN, "attention": "eager", "set": {**TOKENS, **NO_CACHE}}),
    ("gemma", {**MIXED, "batching": "padded", "set": TOKENS}),
    ("phi3", {**WIDE, "attention": "sdpa_math", "set": TOKENS}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_prefix_tuning_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "prefix_tuning", **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "num_virtual_tokens=None"),
        ({"set": {**TOKENS, "method.num_layers": 7}}, "num_layers=7 does not fit"),
        ({"set": TOKENS, "batching": "packed"}, "PEFT drops position_ids"),
        ({"set": TOKENS, "recompute": "full"}, "gradient checkpointing"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="prefix_tuning", **fields))
