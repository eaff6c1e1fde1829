"""DeepSpeed's ZeRO beside the library's own rules of thumb.

deepspeed 0.19.8, runtime/zero/stage_1_and_2.py and stage3.py, `estimate_zero2_model_states_mem_needs` and
`estimate_zero3_model_states_mem_needs` without offload: 2 bytes a parameter and 18 over the ranks for stage 2
(gradients 2 + 4, masters 4, Adam's states 8), 18 over the ranks and the largest layer for stage 3, which leaves out 2
of parts 2, gradients 2 + 4, masters 4 and states 8. Both count every parameter of the model as one that trains.
"""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.job import make_job
from peftplan.pipeline import Reading, read

CONFIG: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 128, "vocab_size": 128, "torch_dtype": "bfloat16",
}  # fmt: skip
RANKS = 8
FUSED = {"optimizer.impl": "fused", "layout.reduce_bucket_size": 1}


def _read(layout: str, **fields: Any) -> Reading:
    knobs = {**FUSED, **({"layout.param_persistence_threshold": 0} if layout == "zero3" else {})}
    asked = {"model": "tiny", "config": CONFIG, "method": "full", "seq_len": 8, "backend": "cpu", "gpus": RANKS}
    return read(make_job(**{**asked, "layout": layout, "precision": "bf16-mixed", "set": knobs, **fields}))


def _states(reading: Reading) -> int:
    """Weights, gradients in both dtypes and states, at the optimizer's step; without buffers of tables."""
    return reading.step.phases["optimizer"].bytes - reading.static["buffer"] - _left(reading)


def _left(reading: Reading) -> int:
    """What a plain loop's variables hold: the batch, the loss and the logits."""
    return reading.step.end_bytes - reading.step.static_bytes - reading.step.grad_bytes


@pytest.mark.parametrize(("layout", "whole", "parts"), [("zero2", 2, 18), ("zero3", 0, 18 + 2)])
def test_full_fine_tuning_is_as_the_library_says(layout: str, whole: int, parts: int) -> None:
    reading = _read(layout)
    numel = reading.estimate.parameters.total
    said = whole * numel + parts * numel / RANKS
    assert _states(reading) == pytest.approx(said, rel=0.01)


@pytest.mark.parametrize(("layout", "whole"), [("zero2", 2), ("zero3", 0)])
def test_frozen_weights_are_not_what_the_library_says(layout: str, whole: int) -> None:
    """Of what is frozen there are neither gradients nor masters nor states."""
    reading = _read(layout, method="lora", rank=2, dtype="bf16")
    numel, trained = reading.estimate.parameters.total, reading.estimate.parameters.trainable
    said = whole * numel + 18 * numel / RANKS
    right = whole * numel + (0 if whole else 2 * numel / RANKS) + 18 * trained / RANKS
    assert _states(reading) == pytest.approx(right, rel=0.02)
    assert said > 1.5 * right
