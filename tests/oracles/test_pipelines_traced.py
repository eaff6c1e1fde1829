"""Every rank of a pipeline against torch.distributed.pipelining running the real model's layers."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from peftplan import estimate
from peftplan.instruments.stages import traced_peak
from peftplan.job import Job
from tests.conformance import zoo

pytestmark = pytest.mark.trace


def job(method: str, layout: str, gpus: int, micro_batches: int, **settings: Any) -> Job:
    sizes = {"model.num_hidden_layers": 8, "model.use_cache": False, "model.max_position_embeddings": 512}
    fields: dict[str, Any] = {
        "method": method, "micro_batch": 2, "seq_len": 128, "grad_accum": micro_batches, "batching": "exact",
        "layout": layout, "gpus": gpus, "backend": "cpu", "optimizer": "adamw", "recompute": "none",
        "set": {**sizes, "optimizer.impl": "foreach", **settings},
    }  # fmt: skip
    fields["recompute"] = fields["set"].pop("recompute", "none")
    if method != "full":
        fields["target_modules"] = ("q_proj", "down_proj")
    return zoo.job("grouped", fields)


def errors(given: Job) -> list[float]:
    """Predicted over traced, less one, of each rank."""
    ranks = estimate(given).memory.per_rank
    return [rank.peak_bytes / traced_peak(given, i) - 1 for i, rank in enumerate(ranks)]


@pytest.mark.parametrize(
    ("method", "layout", "gpus", "micro_batches", "settings"),
    [
        ("full", "pp=2", 2, 4, {}),
        ("lora", "pp=2", 2, 4, {}),
        ("lora", "pp=4", 4, 6, {}),
        ("ia3", "pp=2", 2, 3, {}),
        ("lora", "pp=2", 2, 2, {"method.use_dora": True}),
        ("lora", "pp=2", 2, 4, {"recompute": "full"}),
        ("full", "pp=3", 3, 3, {"layout.uneven": True}),
    ],
)
def test_one_forward_one_backward(
    method: str, layout: str, gpus: int, micro_batches: int, settings: dict[str, Any]
) -> None:
    """All but scalars: a loss of each micro-batch, optimizers' counters."""
    found = errors(job(method, layout, gpus, micro_batches, **settings))
    assert max(map(abs, found)) < 1e-3, found


@pytest.mark.parametrize(
    ("layout", "gpus", "schedule"),
    [("pp=2", 2, "gpipe"), ("pp=2,vpp=2", 2, "interleaved"), ("pp=4,vpp=2", 4, "interleaved")],
)
def test_other_schedules(layout: str, gpus: int, schedule: str) -> None:
    """One hidden state at most too much: the gradient sent last is taken to wait on ranks where it does not."""
    found = errors(job("full", layout, gpus, 8, **{"layout.schedule": schedule}))
    assert min(found) > -1e-3, found
    assert max(found) < 0.01, found


@pytest.mark.parametrize("method", ["full", "lora"])
def test_zero_bubble(method: str) -> None:
    """Which of a forward's tensors a put-off gradient still needs is approximated (see peftplan/staged.py): most where
    activations are nearly all there is, as here."""
    found = errors(job(method, "pp=4", 4, 8, **{"layout.schedule": "zero_bubble"}))
    assert max(map(abs, found)) < 0.07, found
