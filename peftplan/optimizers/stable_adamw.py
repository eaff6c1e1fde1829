"""StableAdamW (Wortsman 2023, arXiv:2304.13013) as optimi 0.3.3 runs it: AdamW's states and a Kahan compensation.

Mirrors optimi/stableadamw.py: two states of each weight's own dtype, for half-precision weights a third one (unless
`kahan_sum` is false), and eps squared as a scalar; the squared gradient and the larger of second moment and eps per
weight (for-loop), or the latter for all weights of a dtype (foreach, which overwrites gradients). On CUDA Triton
kernels make nothing, and keep a float and where there is no compensation one byte besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from peftplan.optimizers.base import Locals, Optimizer, State, Trained, by_dtype

VARIANTS: dict[str, dict[str, Any]] = {"optimi_stable_adamw": {}}
HARMLESS = frozenset({"decouple_lr", "max_lr"})


@final
@dataclass(frozen=True)
class StableAdamW(Optimizer):
    kahan_sum: bool | None = None
    """None: for half-precision weights."""
    impl: Literal["auto", "for-loop", "foreach", "triton"] = "auto"
    """auto: Triton on CUDA, for-loop on the CPU."""

    def _resolved(self, backend: str) -> str:
        if self.impl != "auto":
            return self.impl
        return "triton" if backend == "cuda" else "for-loop"

    def _kahan(self, w: Trained) -> bool:
        return self.kahan_sum is not False and w.dtype.is_half

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        triton = self._resolved(backend) == "triton"
        for w in weights:
            yield State(w.bytes, w.copies * (2 + self._kahan(w)))
            yield State(w.dtype.size, w.copies)
            if triton:
                yield State(4, w.copies)
                if not self._kahan(w):
                    yield State(1, w.copies)

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        how = self._resolved(backend)
        if how == "for-loop":
            return super().step_bytes(weights, backend)
        return max(by_dtype(weights).values(), default=0) if how == "foreach" else 0

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        """The function that does it returns: nothing outlives its weight."""
        del backend
        local.touch(2 * w.bytes)


OPTIMIZER = StableAdamW
EXAMPLES = (StableAdamW(), StableAdamW(kahan_sum=False), StableAdamW(impl="for-loop"), StableAdamW(impl="foreach"))
UNVERIFIED: dict[str, str] = {}
