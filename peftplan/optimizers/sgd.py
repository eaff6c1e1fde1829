"""SGD, with or without (Nesterov) momentum, as torch.optim.SGD runs it: no state, or one of each weight's dtype.

Mirrors torch 2.13, torch/optim/sgd.py: weight decay makes a new gradient of every weight (in _multi_tensor_sgd of all
of a dtype at once), Nesterov's momentum another one in the for-loop; _fused_sgd makes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from peftplan.optimizers._torch import Impl, resolved
from peftplan.optimizers.base import Locals, Optimizer, State, Trained, by_dtype

VARIANTS: dict[str, dict[str, Any]] = {"sgd_momentum": {"momentum": 0.9}}
HARMLESS = frozenset({"dampening", "maximize"})


@final
@dataclass(frozen=True)
class Sgd(Optimizer):
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    impl: Impl = "auto"

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        del backend
        return (State(w.bytes, w.copies) for w in weights if self.momentum)

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        how = resolved(self.impl, backend)
        if how == "for-loop":
            return super().step_bytes(weights, backend)
        return max(by_dtype(weights).values(), default=0) if how == "foreach" and self.weight_decay else 0

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        del backend
        local.bind("grad", 0)
        if self.weight_decay:
            local.bind("grad", w.bytes)
        if self.momentum:
            local.bind("grad", w.bytes if self.nesterov else 0)


OPTIMIZER = Sgd
EXAMPLES = (
    Sgd(momentum=0.9),
    Sgd(momentum=0.9, weight_decay=0.1, impl="for-loop"),
    Sgd(momentum=0.9, nesterov=True, impl="for-loop"),
    Sgd(momentum=0.9, weight_decay=0.1, impl="foreach"),
    Sgd(momentum=0.9, impl="fused"),
)
UNVERIFIED: dict[str, str] = {}
