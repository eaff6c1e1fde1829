"""SuperTuning against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "down_proj")
ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": {"method.sparsity": 0.9}}),
    ("llama", {**AGAIN, "set": {"method.sparsity": 0.7}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "set": {"method.sparsity": 0.9}}),
    ("gemma", {**WIDE, "set": {"method.sparsity": 0.5}}),
    ("qwen2", {**PLAIN, "adapter_dtype": "bf16"}),
    ("phi3", {**PLAIN, "set": {"method.sparsity": 0.9}}),
    ("llama", {**PLAIN, "rank": 4, "set": {"method.sparsity": 0.9, "method.lora_dropout": 0.1}}),
    ("qwen2", {**AGAIN, "rank": 3, "set": {"method.sparsity": 0.8}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_supertuning_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "supertuning", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.sparsity": 1.0}}, "sparsity=1.0"),
        ({"set": {"method.r": 0}}, "at least 1"),
        ({"format": "nf4"}, "torch does not mix integers in"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="supertuning", **fields))
