"""DoRA against the traced PEFT model, and what it refuses."""

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

DORA = {"method.use_dora": True}
DROPPED = {**DORA, "method.lora_dropout": 0.1}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": DROPPED}),
    ("llama", {**AGAIN, "set": DORA, "adapter_dtype": "bf16"}),
    ("llama", {**PACKED, "set": DORA, "format": "int8"}),
    ("llama_biased", {**WIDE, "set": DORA}),
    ("qwen2", {**MIXED, "set": DORA}),
    ("qwen2", {**PACKED, "set": DROPPED}),
    ("gemma", {**AGAIN, "set": DORA}),
    ("phi3", {**PLAIN, "set": DORA}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_dora_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "lora", "rank": 4, "target_modules": "all-linear", **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {**DORA, "method.lora_bias": True}}, "no bias on DoRA"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", **{"method": "lora", "rank": 4, "target_modules": "all-linear", **fields}))


def test_the_names_are_settings_of_lora() -> None:
    plain = make_job(model="llama-7b", method="lora", format="nf4", set={"format.double_quant": True, **DORA})
    named = make_job(model="llama-7b", method="qdora")
    assert estimate(named).memory.saved_for_backward_bytes == estimate(plain).memory.saved_for_backward_bytes
    assert estimate(named).parameters == estimate(plain).parameters
    assert (
        estimate(make_job(model="llama-7b", method="dora")).parameters.trainable == estimate(named).parameters.trainable
    )
