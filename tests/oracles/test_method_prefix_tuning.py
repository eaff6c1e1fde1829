"""Prefix tuning against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.errors import PeftplanError, RequestError
from peftplan.instruments.trace import trace
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import COMMON, MIXED, OWN, PACKED, PLAIN, SIZES, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

TOKENS: dict[str, Any] = {"method.num_virtual_tokens": 5}
PROJECTED = {**TOKENS, "method.prefix_projection": True, "method.encoder_hidden_size": 21}
NO_CACHE = {"model.use_cache": False}
IGNORED = {"method.token_dim": 7, "method.num_attention_heads": 3}
"""PEFT overwrites these where the config has a head_dim."""
ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": TOKENS}),
    ("llama", {**WIDE, "set": {**PROJECTED, **NO_CACHE}}),
    ("llama", {**PACKED, "set": TOKENS}),
    ("llama", {**PLAIN, "set": {**TOKENS, **NO_CACHE, "loop.outputs_until": "loss"}}),
    ("qwen2", {**MIXED, "set": {**PROJECTED, **NO_CACHE}}),
    ("gemma", {**PLAIN, "attention": "eager", "set": {**TOKENS, **NO_CACHE}}),
    ("gemma", {**MIXED, "batching": "padded", "set": TOKENS}),
    ("phi3", {**WIDE, "attention": "sdpa_math", "set": TOKENS}),
    ("phi3", {**PLAIN, "set": {**TOKENS, "method.token_dim": 64, "method.num_attention_heads": 8}}),
    ("llama", {**PLAIN, "set": {**TOKENS, **IGNORED, "method.modules_to_save": ["lm_head"]}}),
    ("llama", {**WIDE, "set": {**TOKENS, **NO_CACHE, "method.num_layers": 5}}),
    ("phi3", {**PLAIN, "set": {**PROJECTED, "method.num_layers": 4, "loop.outputs_until": "loss"}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_prefix_tuning_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "prefix_tuning", **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "num_virtual_tokens=None"),
        ({"set": TOKENS, "batching": "packed"}, "behind a cache transformers does not tell documents apart"),
        ({"set": TOKENS, "recompute": "full"}, "gradient checkpointing"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="prefix_tuning", **fields))


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"method.num_layers": 2}, "fewer layers than the model, which has 3"),
        ({"method.num_transformer_submodules": 2}, "num_transformer_submodules=2 does not fit"),
        ({"method.token_dim": 7}, "their quotient for head_dim, which is 8"),
        ({"method.num_attention_heads": 5}, "their quotient for head_dim"),
    ],
)
def test_what_peft_cannot_run_is_refused(knobs: dict[str, Any], said: str) -> None:
    config = {"model_type": "phi3", **SIZES, **OWN["phi3"]}
    job = make_job(model="tiny", config=config, method="prefix_tuning", set={**TOKENS, **knobs}, **{**COMMON, **PLAIN})
    with pytest.raises(RequestError, match=said):
        estimate(job)
    with pytest.raises(PeftplanError):
        trace(job)
