"""BOFT against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "down_proj")
ROWS: list[Row] = [
    ("qwen2", {**PACKED, "recompute": "full", "batching": "padded"}),
    ("llama", {**PLAIN}),
    ("llama", {**AGAIN, "set": {"method.boft_block_size": 8}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "set": {"method.boft_block_size": 2, "method.bias": "boft_only"}}),
    ("gemma", {**WIDE}),
    ("qwen2", {**PLAIN, "adapter_dtype": "bf16"}),
    ("phi3", {**PLAIN, "set": {"method.boft_block_size": 0, "method.boft_block_num": 4}}),
    ("llama", {**PLAIN, "set": {"method.boft_n_butterfly_factor": 2}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_boft_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "boft", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.boft_block_size": 7}}, "do not fit the input"),
        ({"set": {"method.boft_block_num": 7}}, "set one of them"),
        ({"set": {"method.boft_n_butterfly_factor": 2}}, "needs PEFT's CUDA extension"),
        ({"set": {"method.boft_dropout": 0.1}}, "boft_dropout=0.1 is not modelled"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="boft", **fields))
