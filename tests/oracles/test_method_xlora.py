"""X-LoRA against the traced PEFT model with its two passes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import OutsideError, RequestError
from peftplan.instruments.trace import trace
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, COMMON, MIXED, PACKED, PLAIN, SIZES, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "down_proj")
DEEP = {"method.xlora_depth": 3, "method.xlora_size": 20}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "rank": 4}),
    ("llama", {**PLAIN, "rank": 4, "target_modules": ("q_proj", "lm_head"), "set": {"method.adapters": 1}}),
    ("llama", {**WIDE, "rank": 3, "set": {"method.adapters": 3, "method.layerwise_scalings": True}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "rank": 4, "set": DEEP}),
    ("qwen2", {**PLAIN, "rank": 6, "adapter_dtype": "bf16", "grad_accum": 2}),
    ("gemma", {**WIDE, "rank": 5}),
    ("phi3", {**PLAIN, "rank": 9, "set": {"method.use_trainable_adapters": True}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_xlora_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "xlora", "target_modules": targets, **fields})


@pytest.mark.parametrize("fields", [AGAIN, PACKED], ids=("recompute", "packed"))
def test_what_peft_cannot_run_is_refused(fields: dict[str, Any]) -> None:
    config = {"model_type": "llama", **SIZES}
    job = make_job(model="llama", config=config, method="xlora", rank=4, **{**COMMON, **fields})
    with pytest.raises(OutsideError):
        trace(job)
    with pytest.raises(RequestError, match=r"PEFT (cannot run xlora|has no X-LoRA on packed)"):
        estimate(job)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.adapters": 0}}, "adapters=0: must be at least 1"),
        ({"set": {"method.hidden_size": 7}}, "hidden_size=7: this model has 4096"),
        ({"set": {"method.top_k_lora": 1}}, "other than a softmax over all adapters"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="xlora", **fields))
