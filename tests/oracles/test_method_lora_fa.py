"""LoRA-FA against the traced PEFT model, and what it refuses."""

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

DROPPED = {"method.lora_dropout": 0.1}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": DROPPED}),
    ("llama", {**AGAIN, "set": {"method.modules_to_save": ["lm_head"]}}),
    ("llama_biased", {**WIDE, "set": {"method.bias": "lora_only", "method.lora_bias": True}}),
    ("qwen2", {**MIXED, "set": DROPPED}),
    ("qwen2", {**PACKED, "set": DROPPED}),
    ("gemma", {**AGAIN, "adapter_dtype": "bf16"}),
    ("phi3", PLAIN),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_lora_fa_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "lora_fa", "rank": 4, "target_modules": "all-linear", **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.use_dora": True}}, "use_dora"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(
            make_job(model="llama-7b", **{"method": "lora_fa", "rank": 4, "target_modules": "all-linear", **fields})
        )
