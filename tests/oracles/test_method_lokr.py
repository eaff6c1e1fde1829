"""LoKr against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.methods.lokr import split
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
FACTOR = "method.decompose_factor"
FUSED = ("qkv_proj", "o_proj", "down_proj")
ROWS: list[Row] = [
    ("llama", {**PLAIN, "rank": 4}),
    ("llama", {**AGAIN, "rank": 2, "set": {"method.decompose_both": True}}),
    (
        "qwen2",
        {**MIXED, "dtype": "bf16", "rank": 2, "set": {"method.decompose_both": True, FACTOR: 5}},
    ),
    ("qwen2", {**PLAIN, "rank": 3, "adapter_dtype": "bf16"}),
    ("gemma", {**WIDE, "rank": 40, "set": {"method.decompose_factor": 4}}),
    ("gemma", {**AGAIN, "rank": 4}),
    ("phi3", {**MIXED, "dtype": "bf16", "rank": 4}),
    ("qwen2", {**AGAIN, "rank": 4, "set": {"method.rank_dropout": 0.1, "method.rank_dropout_scale": True}}),
    ("llama", {**PLAIN, "rank": 4, "adapter_dtype": "bf16", "set": {"method.rank_dropout": 0.1}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_lokr_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "lokr", "target_modules": targets, **fields})


def test_the_factors_are_those_of_peft() -> None:
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 200):
        for factor in (-1, 1, 2, 3, 8, 32):
            assert split(size, factor) == factorization(size, factor)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.rank_dropout": 1.0}}, "rank_dropout=1.0"),
        ({"set": {"method.decompose_factor": 0}}, "decompose_factor=0"),
        ({"format": "nf4"}, "packed weight's shape"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="lokr", **fields))
