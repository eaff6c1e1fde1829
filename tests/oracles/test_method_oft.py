"""OFT against the traced PEFT model, and what it refuses."""

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
TERMS = "method.num_cayley_neumann_terms"
FUSED = ("qkv_proj", "o_proj", "down_proj")
ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": {"method.oft_block_size": 8}}),
    ("llama", {**PACKED, "set": {"method.oft_block_size": 8}}),
    ("llama", {**PACKED, "recompute": "full", "batching": "padded", "set": {"method.oft_block_size": 8}}),
    ("llama", {**AGAIN, "set": {"method.oft_block_size": 0, "method.r": 3}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "set": {"method.oft_block_size": 5, "method.bias": "oft_only"}}),
    ("gemma", {**WIDE, "set": {"method.oft_block_size": 5, "method.block_share": True, TERMS: 3}}),
    ("gemma", {**AGAIN, "set": {"method.oft_block_size": 8, TERMS: 7}}),
    ("phi3", {**PLAIN, "adapter_dtype": "bf16", "set": {"method.oft_block_size": 16, TERMS: 2}}),
    ("qwen2", {**AGAIN, "set": {"method.oft_block_size": 8, "method.use_cayley_neumann": False}}),
    ("llama", {**PLAIN, "adapter_dtype": "bf16", "set": {"method.oft_block_size": 8, "method.coft": True}}),
    ("gemma", {**PACKED, "set": {"method.oft_block_size": 8, "method.coft": True, "method.use_cayley_neumann": False}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_oft_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "oft", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 4}, "set one of them, the other to 0"),
        ({"set": {"method.num_cayley_neumann_terms": 1}}, "at least 2"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="oft", **fields))
