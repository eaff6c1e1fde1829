"""Context-aware prompt tuning against the traced PEFT model, and what it refuses.

Which tokens are labels is in the values, so the trace runs on real ones.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.errors import RequestError, Unsupported
from peftplan.instruments.trace import trace
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, SIZES, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

PROMPT: dict[str, Any] = {"method.cpt_token_ids": [1, 2, 3, 4, 5], "method.cpt_tokens_type_mask": [1, 2, 3, 4, 4]}
TURNS = {"method.cpt_token_ids": [7] * 8, "method.cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8]}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": {"method.modules_to_save": ["lm_head"]}}),
    ("llama", {**PACKED, "recompute": "full", "batching": "padded"}),
    ("llama", {**AGAIN, "set": {**TURNS, "loop.outputs_until": "loss"}}),
    ("llama", WIDE),
    ("qwen2", {**WIDE, "micro_batch": 1, "set": {"method.cpt_mask": [0, 1, 1, 1, 1]}}),
    ("gemma", AGAIN),
    ("phi3", {**MIXED, "attention": "eager", "set": TURNS}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_cpt_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "cpt", **fields, "set": {**PROMPT, **fields.get("set", {})}})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {**PROMPT, "method.cpt_tokens_type_mask": [1, 2]}}, "one number per token"),
        ({"set": {**PROMPT, "method.cpt_mask": [1]}}, "one number per token"),
        ({"set": {**PROMPT, "method.modules_to_save": ["embed_tokens"]}}, "would never train"),
        ({"set": {**PROMPT, "loss.style": "fused_head"}}, "loss.style=fused_head never makes"),
        ({"set": PROMPT, "batching": "packed"}, "PEFT drops position_ids"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="cpt", **fields))


def test_a_trace_of_a_large_model_is_refused() -> None:
    config = {"model_type": "llama", **SIZES, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32_000}
    job = make_job(model="large", config=config, method="cpt", backend="cpu", set=PROMPT)
    with pytest.raises(Unsupported, match="depends on the values of weights"):
        trace(job)
