"""Adagrad (Duchi 2011) as torch.optim.Adagrad runs it: one state of each weight's own dtype.

Mirrors torch 2.13, torch/optim/adagrad.py: the root of the sum per weight (_single_tensor_adagrad); of all weights of
one dtype together with their scaled gradients (_multi_tensor_adagrad). The step counter is on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from peftplan.optimizers._torch import Loop, resolved
from peftplan.optimizers.base import Locals, Optimizer, State, Trained, by_dtype, each_and_step

VARIANTS: dict[str, dict[str, Any]] = {}
HARMLESS = frozenset({"lr_decay", "initial_accumulator_value"})


@final
@dataclass(frozen=True)
class Adagrad(Optimizer):
    weight_decay: float = 0.0
    impl: Loop = "auto"

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        return each_and_step(weights, count=1, step_on_host=backend == "cuda")

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        if resolved(self.impl, backend) == "for-loop":
            return super().step_bytes(weights, backend)
        local = Locals()
        for size in by_dtype(weights).values():
            local.bind("grads", 0)
            local.bind("grads", size if self.weight_decay else 0)
            local.bind("std", size)
            local.bind("numerator", 0 if self.weight_decay else size)
        return local.peak

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        del backend
        local.bind("grad", w.bytes if self.weight_decay else 0)
        local.bind("std", w.bytes)


OPTIMIZER = Adagrad
EXAMPLES = (
    Adagrad(),
    Adagrad(impl="for-loop"),
    Adagrad(weight_decay=0.1, impl="for-loop"),
    Adagrad(weight_decay=0.1, impl="foreach"),
)
UNVERIFIED: dict[str, str] = {}
