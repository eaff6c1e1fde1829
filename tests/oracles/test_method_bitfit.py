"""BitFit against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, SIZES, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

BIASED: dict[str, Any] = {"config": {"model_type": "llama", **SIZES, "attention_bias": True}}
ROWS: list[Row] = [
    ("llama_biased", PLAIN),
    ("llama_biased", AGAIN),
    ("qwen2", WIDE),
    ("qwen2", MIXED),
    ("qwen2", PACKED),
    ("qwen2", {**PACKED, "format": "int8"}),
    ("qwen2", {**AGAIN, "set": {"method.train": ["v_proj"]}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_bitfit_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "bitfit", **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "have no biases"),
        ({**BIASED, "set": {"method.train": ["down_proj"]}}, "has no bias; this model has them on k_proj, o_proj"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", **{"method": "bitfit", **fields}))
