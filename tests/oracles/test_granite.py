"""Granite's multipliers against the traced model, to the byte."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.errors import Unsupported
from peftplan.pipeline import read
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, WIDE, assert_equal, tiny_job

LORA: dict[str, Any] = {"method": "lora", "rank": 4, "target_modules": "all-linear"}
JOBS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", **PLAIN},
    "full-again": {"method": "full", **AGAIN},
    "full-eager": {"method": "full", **WIDE, "attention": "eager"},
    "lora": {**LORA, **PLAIN},
    "lora-again": {**LORA, **AGAIN},
    "lora-mixed-again": {**LORA, **MIXED, "recompute": "full"},
    "lora-reentrant": {**LORA, **PACKED, "recompute": "full", "set": {"recompute.use_reentrant": True}},
    "lora-embedding-again": {**LORA, **AGAIN, "target_modules": ["embed_tokens", "q_proj"]},
    "prompts-again": {"method": "prompt_tuning", "set": {"method.num_virtual_tokens": 3}, **AGAIN},
    "prefixes": {"method": "prefix_tuning", "set": {"method.num_virtual_tokens": 3}, **PLAIN},
}


@pytest.mark.trace
@pytest.mark.parametrize("job", JOBS)
def test_multipliers_are_as_transformers_has_them(job: str) -> None:
    """What the embedding says is a leaf before it is multiplied, where it does not train."""
    assert_equal("granite", JOBS[job])


def test_a_fused_head_on_scaled_logits_is_not_modelled() -> None:
    with pytest.raises(Unsupported, match="on granite, which scales its logits"):
        read(tiny_job("granite", {**JOBS["lora"], "set": {"loss.style": "fused_head"}}))


@pytest.mark.parametrize("family", ["granite", "mixtral", "deepseek_v3"])
def test_libraries_kernels_are_not_modelled_on_them(family: str) -> None:
    with pytest.raises(Unsupported, match="a library's kernels on"):
        read(tiny_job(family, {"method": "full", **PLAIN, "backend": "cuda", "kernels": "liger"}))
