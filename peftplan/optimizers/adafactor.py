"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) as transformers runs it: fp32 rows and columns of matrices.

Mirrors transformers 5.23, transformers/optimization.py, Adafactor.step: a matrix keeps the mean square of its rows and
of its columns, anything else one state; all in fp32, and `beta1` adds one more of the weight's shape. For each weight
the step makes an fp32 copy of a half-precision weight and of its gradient, and two fp32 updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from peftplan.optimizers._factored import factors, refine
from peftplan.optimizers.base import Locals, Optimizer, State, Trained

VARIANTS: dict[str, dict[str, Any]] = {}
HARMLESS = frozenset({"scale_parameter", "relative_step", "warmup_init", "clip_threshold", "decay_rate"})
_SCALAR = 4


@final
@dataclass(frozen=True)
class Adafactor(Optimizer):
    beta1: float | None = None
    """Given, it adds a first moment."""

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        del backend
        for w in weights:
            for numel in factors(w.shape):
                yield State(4 * numel, w.copies)
            if self.beta1 is not None:
                yield State(4 * w.numel, w.copies)
            yield State(_SCALAR, w.copies)

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        del backend
        full, half = 4 * w.numel, w.dtype.is_half
        local.bind("grad", 0)
        local.bind("grad", full if half else 0)
        local.bind("weight", 0)
        local.bind("weight", full if half else 0)
        refine(local, w.shape)
        if self.beta1 is not None:
            local.bind("update", 0)
        local.touch(full)


OPTIMIZER = Adafactor
EXAMPLES = (Adafactor(), Adafactor(beta1=0.9))
UNVERIFIED: dict[str, str] = {}
