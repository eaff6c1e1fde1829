"""VB-LoRA against the traced PEFT model, and what it refuses."""

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
    ("qwen2", {**PACKED, "recompute": "full", "set": {"method.vector_length": 4, "method.num_vectors": 9}}),
    ("llama", {**PLAIN, "rank": 2, "set": {"method.vector_length": 4, "method.num_vectors": 9}}),
    (
        "llama",
        {
            **AGAIN,
            "rank": 3,
            "set": {"method.vector_length": 8, "method.num_vectors": 7, "method.topk": 3, "method.vblora_dropout": 0.1},
        },
    ),
    (
        "qwen2",
        {
            **MIXED,
            "dtype": "bf16",
            "rank": 2,
            "set": {"method.vector_length": 8, "method.num_vectors": 7, "method.bias": "all"},
        },
    ),
    ("gemma", {**WIDE, "rank": 2, "set": {"method.vector_length": 4, "method.num_vectors": 5}}),
    (
        "qwen2",
        {**PLAIN, "rank": 2, "adapter_dtype": "bf16", "set": {"method.vector_length": 4, "method.num_vectors": 9}},
    ),
    ("phi3", {**PLAIN, "rank": 2, "set": {"method.vector_length": 8, "method.num_vectors": 9}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_vblora_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "vblora", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.vector_length": 7}}, "vector_length=7 does not divide"),
        ({"set": {"method.topk": 0}}, "topk=0"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="vblora", **fields))
