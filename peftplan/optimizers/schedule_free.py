"""Schedule-free AdamW, RAdam and SGD (Defazio 2024, arXiv:2405.15682) as schedulefree 1.4.1 runs them.

Mirrors schedulefree/adamw_schedulefree.py, radam_schedulefree.py and sgd_schedulefree.py: a copy `z` of each weight in
its own dtype, and but for SGD a second moment; the denominators of all weights at once (foreach, the default on any
device) or of one (for-loop). Gradients are overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from peftplan.optimizers.base import Locals, Optimizer, State, Trained

VARIANTS: dict[str, dict[str, Any]] = {
    "schedule_free_adamw": {},
    "schedule_free_radam": {"base": "radam"},
    "schedule_free_sgd": {"base": "sgd"},
}
HARMLESS = frozenset({"warmup_steps", "r", "weight_lr_power", "momentum", "silent_sgd_phase"})


@final
@dataclass(frozen=True)
class ScheduleFree(Optimizer):
    base: Literal["adamw", "radam", "sgd"] = "adamw"
    foreach: bool = True

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        del backend
        return (State(w.bytes, w.copies * (1 if self.base == "sgd" else 2)) for w in weights)

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        if self.base == "sgd":
            return 0
        return sum(w.bytes * w.copies for w in weights) if self.foreach else super().step_bytes(weights, backend)

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        del backend
        local.bind("denom", w.bytes)


OPTIMIZER = ScheduleFree
EXAMPLES = (ScheduleFree(), ScheduleFree(foreach=False), ScheduleFree(base="radam"), ScheduleFree(base="sgd"))
UNVERIFIED: dict[str, str] = {}
