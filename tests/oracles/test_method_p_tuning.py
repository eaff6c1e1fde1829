"""P-tuning against the traced PEFT model, and what it refuses."""

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

TOKENS = {"method.num_virtual_tokens": 5, "method.encoder_hidden_size": 21}
LSTM = {"method.encoder_reparameterization_type": "LSTM"}
DEEP = {"method.encoder_num_layers": 3, "method.encoder_dropout": 0.1}
ROWS: list[Row] = [
    ("llama", PLAIN),
    ("llama", {**PACKED, "recompute": "full", "batching": "padded"}),
    ("llama", {**AGAIN, "set": {"loop.outputs_until": "loss"}}),
    ("llama", {**WIDE, "attention": "eager"}),
    ("qwen2", {**MIXED, "set": {"method.modules_to_save": ["lm_head"]}}),
    ("gemma", AGAIN),
    ("gemma", PLAIN),
    ("phi3", WIDE),
    ("llama", {**PLAIN, "set": LSTM}),
    ("llama", {**MIXED, "micro_batch": 1, "seq_len": 3, "set": {**LSTM, **DEEP, "method.encoder_hidden_size": 64}}),
    ("gemma", {**AGAIN, "set": {**LSTM, **DEEP}}),
    ("qwen2", {**WIDE, "set": {**LSTM, "method.encoder_num_layers": 1}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_p_tuning_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "p_tuning", **fields, "set": {**TOKENS, **fields.get("set", {})}})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "num_virtual_tokens=None"),
        ({"set": {**TOKENS, "method.token_dim": 7}}, "token_dim=7 does not fit"),
        ({"set": {**TOKENS, "method.encoder_num_layers": 0}}, "encoder_num_layers=0"),
        ({"set": {**TOKENS, "method.encoder_dropout": 1.5}}, "encoder_dropout=1.5"),
        ({"set": TOKENS, "batching": "packed"}, "PEFT drops position_ids"),
        ({"set": {**TOKENS, "method.num_transformer_submodules": 2}}, "num_transformer_submodules=2 does not fit"),
        ({"set": {**TOKENS, "method.modules_to_save": ["embed_tokens"]}}, "would never train"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="p_tuning", **fields))
