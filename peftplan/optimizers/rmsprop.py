"""RMSprop (Hinton 2012) as torch.optim.RMSprop runs it: one to three states of each weight's own dtype.

Mirrors torch 2.13, torch/optim/rmsprop.py: the root of the squared average per weight (_single_tensor_rmsprop) or of
all weights of one dtype (_multi_tensor_rmsprop), and with weight decay a new gradient. The step counter is on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from peftplan.optimizers._torch import Loop, resolved
from peftplan.optimizers.base import Locals, Optimizer, State, Trained, by_dtype, each_and_step

VARIANTS: dict[str, dict[str, Any]] = {}
HARMLESS = frozenset({"alpha"})


@final
@dataclass(frozen=True)
class RMSprop(Optimizer):
    momentum: float = 0.0
    centered: bool = False
    weight_decay: float = 0.0
    impl: Loop = "auto"

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        count = 1 + self.centered + (self.momentum > 0)
        return each_and_step(weights, count=count, step_on_host=backend == "cuda")

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        if resolved(self.impl, backend) == "for-loop":
            return super().step_bytes(weights, backend)
        local = Locals()
        for size in by_dtype(weights).values():
            self._one(local, size)
        return local.peak

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        del backend
        self._one(local, w.bytes)

    def _one(self, local: Locals, size: int) -> None:
        local.bind("grad", 0)
        local.bind("grad", size if self.weight_decay else 0)
        local.bind("avg", size)


OPTIMIZER = RMSprop
EXAMPLES = (
    RMSprop(),
    RMSprop(momentum=0.9, centered=True),
    RMSprop(weight_decay=0.1, impl="for-loop"),
    RMSprop(weight_decay=0.1, impl="foreach"),
)
UNVERIFIED: dict[str, str] = {}
