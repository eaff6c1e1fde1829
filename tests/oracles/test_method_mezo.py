"""MeZO against a traced step that does what its trainer does."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

import torch

from peftplan.errors import RequestError
from peftplan.instruments.step import Step
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import PLAIN, WIDE, Row, name
from tests.oracles.reference import assert_as_reference

pytestmark = pytest.mark.trace
RATE, EPSILON, DECAY = 1e-6, 1e-3, 0.0
ROWS: list[Row] = [
    ("llama", {**PLAIN}),
    ("qwen2", {**WIDE}),
    ("phi3", {**PLAIN, "attention": "eager", "optimizer": "adamw_torch_fused"}),
    ("llama", {**PLAIN, "micro_batch": 1, "seq_len": 2}),
]


def zeroth_order(step: Step) -> None:
    """zo_step and zo_update."""
    recorder, model = step.recorder, step.model.eval()
    batch = step._batch()
    losses = []
    for factor in (1, -2):
        recorder.phase = "optimizer"
        _move(model, factor)
        recorder.phase = "forward"
        with torch.no_grad():
            losses.append(model(**batch).loss.detach())
    recorder.phase = "optimizer"
    _move(model, 1)
    losses.pop()
    _update(model, 0.5)
    step.saved = []


def _move(model: torch.nn.Module, factor: int) -> None:
    for _, param in model.named_parameters():
        z = torch.normal(mean=0, std=1, size=param.data.size(), device=param.data.device, dtype=param.data.dtype)
        param.data = param.data + factor * z * EPSILON


def _update(model: torch.nn.Module, gradient: float) -> None:
    for _, param in model.named_parameters():
        z = torch.normal(mean=0, std=1, size=param.data.size(), device=param.data.device, dtype=param.data.dtype)
        param.data = param.data - RATE * (gradient * z + DECAY * param.data)


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_it_is_what_its_trainer_does(family: str, fields: dict[str, Any]) -> None:
    assert_as_reference(family, {"method": "mezo", **fields}, lambda model: model, step=zeroth_order)


def test_the_paper_tunes_30_billion_where_a_forward_pass_fits() -> None:
    """Its abstract: with one A100 of 80 GB, a 30-billion model, where full tuning of one of 2.7 billion is the most;
    about inference's memory."""
    job = make_job(model="llama-30b", method="mezo", gpu="a100-80gb", micro_batch=1, seq_len=512, dtype="bf16")
    found = estimate(job)
    assert found.fit.verdict == "fits"
    assert found.parameters.trainable == found.parameters.total
    assert found.memory.static_bytes < 1.01 * found.parameters.stored_bytes
    assert found.flops.backward == found.flops.recompute == 0
    full = estimate(job.model_copy(update={"method": "full"}))
    assert full.fit.verdict == "does_not_fit"
    assert found.flops.forward == 2 * full.flops.forward


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"grad_accum": 2}, "takes one batch a step; use --micro-batch"),
        ({"recompute": "full"}, "use --recompute none"),
        ({"format": "nf4", "recompute": "none"}, "cannot train packed weights"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="mezo", **fields))
