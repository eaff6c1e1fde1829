"""Models with experts against the traced transformers model: to the byte, on fake tensors and on real ones."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.instruments.trace import trace
from peftplan.pipeline import read
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, WIDE, assert_equal, assert_same, name, tiny_job

pytestmark = pytest.mark.trace

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
ATTENTION: dict[str, Any] = {"method": "lora", "rank": 4, "target_modules": ["q_proj", "o_proj"]}
JOBS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", **PLAIN},
    "full-fp32": {"method": "full", **WIDE},
    "full-again": {"method": "full", **AGAIN},
    "full-mixed": {"method": "full", **MIXED},
    "full-mixed-again": {"method": "full", **MIXED, "recompute": "full"},
    "lora": {**ATTENTION, **PLAIN},
    "lora-fp16": {**ATTENTION, **WIDE, "precision": "fp16"},
    "lora-again": {**ATTENTION, **AGAIN},
    "lora-mixed": {**ATTENTION, **MIXED},
    "lora-packed": {**ATTENTION, **PACKED},
    "lora-packed-mixed": {**ATTENTION, **PACKED, "precision": "bf16-mixed"},
    "lora-int8": {**ATTENTION, **PACKED, "format": "int8"},
    "freeze": {"method": "freeze", "set": {"method.layers": 1}, **PLAIN},
    "full-eager-accumulated": {"method": "full", **PLAIN, "attention": "eager", "grad_accum": 2},
}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_as_transformers_has_them(family: str, job: str) -> None:
    assert_equal(family, JOBS[job])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": 9}),
        ("qwen2_moe", {"mlp_only_layers": [1], "norm_topk_prob": True}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 9}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 30}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "norm_topk_prob": False}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9}),
    ],
    ids=name,
)
def test_the_options_of_each_family(family: str, changes: dict[str, Any]) -> None:
    for job in ("full", "lora-mixed"):
        assert_equal(family, JOBS[job], **changes)
    assert_equal(family, {**JOBS["lora"], "attention": "eager", "batching": "padded"}, **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_real_tensors_say_the_same_however_tokens_are_spread(family: str) -> None:
    for base in (AGAIN, MIXED):
        job = tiny_job(family, {"method": "full", **base})
        assert_same(trace(job, mode="real"), read(job).estimate)


@pytest.mark.parametrize("family", FAMILIES)
def test_four_bit_formats_leave_experts_and_router_as_they_are(family: str) -> None:
    """bitsandbytes packs nn.Linear alone; prepare_model_for_kbit_training then casts the rest to fp32."""
    weights = {w.name: w for w, _ in read(tiny_job(family, JOBS["lora-packed"])).graph.params()}
    assert weights["self_attn.q_proj.weight"].stored_bytes is not None
    for stack in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"):
        assert (weights[stack].stored_bytes, weights[stack].dtype.label) == (None, "float32")
    if family == "qwen2_moe":
        assert weights["mlp.shared_expert.up_proj.weight"].stored_bytes is not None
        assert weights["mlp.shared_expert_gate.weight"].stored_bytes is not None
