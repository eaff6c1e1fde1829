"""Cartridges against the traced PEFT model, and what they refuse."""

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
MANY = {"method.num_virtual_tokens": 30, "method.num_frozen_tokens": 25}
NO_CACHE = {"model.use_cache": False}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": TOKENS}),
    ("llama", {**PLAIN, "micro_batch": 1, "seq_len": 3, "set": {**MANY, "loop.outputs_until": "loss"}}),
    ("llama", {**WIDE, "set": {**MANY, **NO_CACHE}}),
    ("llama", {**PLAIN, "grad_accum": 2, "set": MANY}),
    ("llama", {**PACKED, "set": {**TOKENS, "method.num_layers": 5}}),
    ("qwen2", {**MIXED, "set": {**TOKENS, "method.num_frozen_tokens": 0}}),
    ("gemma", {**MIXED, "batching": "padded", "set": {**TOKENS, "method.num_frozen_tokens": 3}}),
    ("phi3", {**WIDE, "attention": "sdpa_math", "set": {**TOKENS, "method.modules_to_save": ["lm_head"]}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_cartridges_are_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "cartridge", **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "num_virtual_tokens=None"),
        ({"set": {**TOKENS, "method.num_frozen_tokens": 5}}, "leave at least one of 5"),
        ({"set": {**TOKENS, "method.num_frozen_tokens": -1}}, "num_frozen_tokens=-1"),
        ({"set": TOKENS, "recompute": "full"}, "gradient checkpointing"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="cartridge", **fields))
