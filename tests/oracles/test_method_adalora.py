"""AdaLoRA against the traced PEFT model with its penalty and its rank allocator, and what it refuses."""

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


def knobs(**more: Any) -> dict[str, Any]:
    """Settings that PEFT accepts, and more."""
    return {f"method.{key}": value for key, value in {"init_r": 4, "target_r": 2, "total_step": 100, **more}.items()}


ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": knobs()}),
    ("llama", {**PLAIN, "set": knobs(update_and_allocate=False, layers_to_transform=(1,))}),
    ("llama", {**PLAIN, "set": knobs(trains_ranknum=False)}),
    ("llama", {**PLAIN, "set": knobs(), "grad_accum": 2}),
    ("llama", {**AGAIN, "set": knobs(init_r=6, lora_dropout=0.1)}),
    ("qwen2", {**MIXED, "dtype": "bf16", "set": knobs(init_r=30, bias="all")}),
    ("qwen2", {**PLAIN, "adapter_dtype": "bf16", "set": knobs()}),
    ("gemma", {**WIDE, "set": knobs(init_r=3)}),
    ("phi3", {**PLAIN, "set": knobs(init_r=9)}),
    ("llama", {**PACKED, "set": knobs()}),
    ("llama", {**PACKED, "format": "int8", "set": knobs()}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_adalora_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "adalora", "target_modules": targets, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "total_step=None"),
        ({"set": knobs(tinit=60, tfinal=40)}, "less than method.total_step=100"),
        ({"set": knobs(target_r=4)}, "target_r=4: PEFT cuts ranks only from method.init_r=4"),
        ({"set": knobs(), "rank": 8}, "--rank means nothing"),
        ({"set": knobs(use_dora=True)}, "use_dora: PEFT's AdaLoRA does not support it"),
        ({"set": knobs(), "format": "int8", "adapter_dtype": "bf16"}, "gives 8-bit layers fp32"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="adalora", **fields))
