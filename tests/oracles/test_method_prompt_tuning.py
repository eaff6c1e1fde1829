"""Prompt tuning against the traced PEFT model, and what it refuses."""

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

TOKENS = {"method.num_virtual_tokens": 5}
ROWS: list[Row] = [
    ("llama", PLAIN),
    ("llama", {**PACKED, "recompute": "full", "batching": "padded"}),
    ("llama", {**AGAIN, "set": {"loop.outputs_until": "loss"}}),
    ("llama", {**WIDE, "attention": "eager"}),
    ("qwen2", {**MIXED, "set": {"method.modules_to_save": ["lm_head"]}}),
    ("gemma", AGAIN),
    ("gemma", PLAIN),
    ("phi3", WIDE),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_prompt_tuning_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "prompt_tuning", **fields, "set": {**TOKENS, **fields.get("set", {})}})


def test_every_activation_is_longer_by_the_virtual_tokens() -> None:
    def saved(seq_len: int, tokens: int) -> int:
        own = {"method.num_virtual_tokens": tokens}
        job = make_job(model="llama-7b", method="prompt_tuning", seq_len=seq_len, backend="cpu", set=own)
        return estimate(job).memory.saved_for_backward_bytes

    assert saved(512, 512) == saved(1000, 24)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "num_virtual_tokens=None"),
        ({"set": {**TOKENS, "method.token_dim": 7}}, "token_dim=7 does not fit"),
        ({"set": TOKENS, "batching": "packed"}, "PEFT drops position_ids"),
        ({"set": {**TOKENS, "method.num_transformer_submodules": 2}}, "num_transformer_submodules=2 does not fit"),
        ({"set": {**TOKENS, "method.modules_to_save": ["embed_tokens"]}}, "would never train"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="prompt_tuning", **fields))
