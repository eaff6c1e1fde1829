"""Llama 2 7B and Llama 3.1 8B at full size: the same numbers, without weights."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.job import make_job
from peftplan.pipeline import read
from tests.oracles.compare import assert_equal

_ALL_LINEAR = {"rank": 16, "target_modules": "all-linear"}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "batching": "padded", **_ALL_LINEAR},
    "qlora recomputed": {"method": "qlora", "recompute": "full", "micro_batch": 2, "batching": "padded", **_ALL_LINEAR},
}


@pytest.mark.trace
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["llama-2-7b", "llama-3.1-8b"])
def test_the_estimate_equals_the_trace(model: str, method: str) -> None:
    asked = {"micro_batch": 1, "seq_len": 512, "batching": "exact", "precision": "bf16", **METHODS[method]}
    config = read(make_job(model=model)).case.arch.model_dump()
    assert_equal(make_job(model=model, config=config, backend="cpu", **asked))
