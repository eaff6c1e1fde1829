"""What a loop does around the optimizer: clipping by the norm of all gradients, moving averages of weights."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from peftplan.errors import RequestError  # noqa: E402
from peftplan.job import make_job  # noqa: E402
from peftplan.pipeline import estimate, read, walk  # noqa: E402
from peftplan.planner.desk import _Optimizer  # noqa: E402
from peftplan.resolve import resolve  # noqa: E402
from peftplan.training_loop import clipping_bytes  # noqa: E402
from tests.oracles.optimizer_step import Named, measured, named_weights, trained  # noqa: E402

pytestmark = pytest.mark.trace
SMALL: dict[str, Any] = {"model": "llama-7b", "method": "full", "micro_batch": 1, "seq_len": 128}


class Clipping:
    """An optimizer's step that only clips."""

    def __init__(self, named: Named) -> None:
        self._weights = list(named.values())
        self.state: dict[str, Any] = {}
        self.param_groups: list[Any] = []

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clipping_makes_norms(dtype: str) -> None:
    assert clipping_bytes(trained(dtype)) == pytest.approx(measured(Clipping, dtype).step, rel=0.05)


def test_clipping_is_part_of_the_step() -> None:
    clipped = make_job(**SMALL, optimizer="sgd", set={"loop.max_grad_norm": 1.0})
    walked = walk(resolve(clipped))
    temporaries = walked.step.phases["optimizer"].bytes - walked.step.end_bytes
    assert temporaries == clipping_bytes(walked.trainees.weights)
    assert temporaries == _Optimizer.of(walked, walked.case.optimizer).step_bytes
    assert 0 < temporaries < 10_000


def test_an_average_of_the_whole_model_is_a_copy_of_it() -> None:
    named = named_weights("bfloat16")
    module = torch.nn.ParameterList(named.values())
    copied = torch.optim.swa_utils.AveragedModel(module)
    held = sum(t.nbytes for t in (*copied.parameters(), *copied.buffers()))
    assert held == sum(w.nbytes for w in named.values()) + 8
    memory = {ema: read(make_job(**SMALL, set={"loop.ema": ema})) for ema in ("none", "trained", "model")}
    static = memory["model"].static
    assert static["average"] >= static["weight"] + static["buffer"]
    assert memory["trained"].static["average"] == static["weight"]
    assert memory["none"].static["average"] == 0
    peaks = {ema: reading.estimate.memory.peak_bytes for ema, reading in memory.items()}
    assert peaks["trained"] - peaks["none"] == static["weight"]


def test_an_average_of_an_adapter_is_small_unless_it_copies_the_model() -> None:
    lora = {**SMALL, "method": "lora"}
    trained_only = estimate(**lora, set={"loop.ema": "trained"}).memory
    whole = estimate(**lora, set={"loop.ema": "model"}).memory
    assert whole.static_bytes - trained_only.static_bytes > 2**33


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loop.max_grad_norm": -1}, "give a number"),
        ({"loop.ema": "all"}, "unknown loop.ema"),
        ({"loop.maxgradnorm": 1}, "max_grad_norm"),
        ({"loop.max_grad_norm": 1, "optimizer.in_backward": True}, "before their norm is known"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        estimate(**SMALL, set=settings)
