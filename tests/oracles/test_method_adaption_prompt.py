"""Adaption prompts against the traced PEFT model, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.errors import PeftplanError, RequestError
from peftplan.instruments.trace import trace
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, SIZES, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

SHAPE: dict[str, Any] = {"method.adapter_len": 7, "method.adapter_layers": 2}
ROWS: list[Row] = [
    ("llama", PLAIN),
    ("llama", {**PLAIN, "micro_batch": 1, "attention": "eager", "set": {"method.adapter_layers": 3}}),
    ("llama", {**AGAIN, "grad_accum": 2, "set": {"loop.outputs_until": "loss"}}),
    ("llama", {**MIXED, "recompute": "full"}),
    ("llama", {**MIXED, "precision": "fp16-mixed", "dtype": "bf16", "attention": "sdpa_math"}),
    ("llama", {**PACKED, "set": {"format.prepare": False}}),
    ("llama", {**PACKED, "format": "int8", "recompute": "full"}),
    ("llama_biased", {**PACKED, "recompute": "full", "precision": "bf16-mixed"}),
    ("llama_biased", WIDE),
    ("mistral", {**AGAIN, "set": {"recompute.use_reentrant": True}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_adaption_prompts_are_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "adaption_prompt", **fields, "set": {**SHAPE, **fields.get("set", {})}})


def _job(config: dict[str, Any], settings: dict[str, Any], **fields: Any) -> Any:
    config = {**SIZES, "model_type": "llama", **config}
    return make_job(model="tiny", config=config, method="adaption_prompt", backend="cpu", set=settings, **fields)


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        ({"model_type": "qwen2"}, {}, "PEFT has no adaption prompts for qwen2"),
        ({"head_dim": 10}, {}, "heads x head_dim"),
        ({}, {"method.adapter_layers": 4}, "this model has 3 layers"),
        ({}, {"method.adapter_layers": None}, "adapter_layers=None"),
        ({}, {"method.adapter_len": None}, "adapter_len=None"),
        ({}, {"method.target_modules": "mlp"}, "name self_attn"),
    ],
)
def test_what_peft_refuses_is_refused(config: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    job = _job(config, {**SHAPE, **settings}, micro_batch=2, seq_len=5)
    with pytest.raises(RequestError, match=said):
        estimate(job)
    with pytest.raises(PeftplanError):
        trace(job)


def test_layers_must_be_counted() -> None:
    with pytest.raises(RequestError, match="at least 1"):  # PEFT takes 0 for all layers
        estimate(_job({}, {**SHAPE, "method.adapter_layers": 0}))


def test_the_paper_trains_1_2_million_of_7_billion() -> None:
    shape = {"method.adapter_len": 10, "method.adapter_layers": 30}  # Zhang 2023, section 4.1
    found = estimate(make_job(model="llama-7b", method="adaption_prompt", backend="cpu", set=shape)).parameters
    assert found.trainable == 30 * (10 * 4096 + 1) == 1_228_830
