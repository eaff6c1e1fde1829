"""Methods that no library has here: written in torch from the paper's equations, traced like a library's, and held to
the estimate to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from peftplan.instruments import build, fakes, quantize, recompute
from peftplan.instruments.answer import Trace
from peftplan.instruments.engine import sole_owner
from peftplan.instruments.hooks import quiet
from peftplan.instruments.optim import Plain
from peftplan.instruments.step import Step
from peftplan.job import Job
from peftplan.pipeline import read
from tests.oracles.equal import assert_same, tiny_job

Change = Callable[[torch.nn.Module], torch.nn.Module]
"""What the method does to the model: modules put in, weights frozen or trained."""
MakeOptimizer = Callable[[torch.nn.Module], Any]
"""What has `step`, `zero_grad`, `state`, and where it holds tensors beside its states, `held`."""

StepWork = Callable[[Step], None]
"""A whole training step, in place of forward, backward and the optimizer's."""


class _Step(Step):
    """A step with an optimizer of the test's own, whose states are named by their place."""

    make: MakeOptimizer | None = None
    between: Change | None = None

    work: StepWork | None = None

    def _step(self) -> None:
        if self.work is not None:
            self.work(self)
        else:
            super()._step()
        if self.between is not None:
            self.between(self.model)

    def _optimizer(self) -> Plain:
        return super()._optimizer() if self.make is None else _Own(self.make(self.model))


class _Own(Plain):
    """An optimizer of the test's own."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def states(self) -> Iterator[tuple[None, str, Any]]:
        held = getattr(self._inner, "held", ())
        each = (value for state in self._inner.state.values() for value in state.values())
        yield from ((None, str(n), t) for n, t in enumerate((*held, *each)) if isinstance(t, torch.Tensor))


def reference(
    job: Job,
    change: Change,
    optimizer: MakeOptimizer | None = None,
    between: Change | None = None,
    step: StepWork | None = None,
) -> Trace:
    """The trace of the job's base model as `change` leaves it; `between` comes after each step."""
    choices = replace(build.decide(job), method="full")
    sole_owner()
    with quiet():
        torch.manual_seed(0)
        model = change(build.base_model(choices, "fake")).train()
        if choices.recompute:
            recompute.checkpoint_layers(model, job)
        trainable, total = PeftModel.get_nb_trainable_parameters(model)
        with fakes.fake_tensors(), quantize.recognised():
            fakes.to_fake(model)
            own = {"make": optimizer, "between": between, "work": step}
            made = type("_Made", (_Step,), {key: value and staticmethod(value) for key, value in own.items()})
            trace: Trace = made(choices, model, "fake").run({"total": total, "trainable": trainable})
            return trace


def assert_as_reference(
    family: str,
    fields: dict[str, Any],
    change: Change,
    optimizer: MakeOptimizer | None = None,
    between: Change | None = None,
    step: StepWork | None = None,
) -> None:
    """The estimate and the trace of the reference are the same numbers."""
    job = tiny_job(family, fields)
    assert_same(reference(job, change, optimizer, between, step), read(job).estimate)


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    stack = model.get_submodule("model.layers")
    assert isinstance(stack, torch.nn.ModuleList)
    return stack


def replace_modules(
    model: torch.nn.Module, names: tuple[str, ...], made: Callable[[str, torch.nn.Module], torch.nn.Module]
) -> torch.nn.Module:
    """The model with `made(path, module)` in place of every module of these names."""
    found = [(path, m) for path, m in model.named_modules() if path.rsplit(".", 1)[-1] in names]
    for path, module in found:
        parent, _, own = path.rpartition(".")
        with torch.device(module.weight.device):
            setattr(model.get_submodule(parent), own, made(path, module))
    return model
