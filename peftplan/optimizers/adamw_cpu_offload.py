"""AdamW on the CPU, as torchao 0.18 runs it: weights, gradients and states have pinned copies in host memory.

Mirrors torchao/optim/cpu_offload.py, CPUOffloadOptimizer: for each weight of at least `minimal_size` elements a copy of
it and of its gradient in host memory, where fused AdamW keeps its states in the weight's dtype; smaller ones are
trained on the GPU. With `offload_gradients` a gradient leaves the GPU as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from peftplan.optimizers.base import Optimizer, State, Trained

VARIANTS: dict[str, dict[str, Any]] = {}


@final
@dataclass(frozen=True)
class AdamWCpuOffload(Optimizer):
    offload_gradients: bool = False
    minimal_size: int = 4096

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        for w in weights:
            host = backend == "cuda" and not self._stays(w)
            yield State(w.bytes, 2 * w.copies, host=host)
            yield State(4, w.copies, host=host)
            if not self._stays(w):
                yield State(w.bytes, 2 * w.copies, host=backend == "cuda")

    @property
    def frees_gradients(self) -> bool:
        return self.offload_gradients

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        del weights, backend
        return 0

    def update_bytes(self, w: Trained, backend: str) -> int | None:
        del backend
        return None if self._stays(w) else 0

    def _stays(self, w: Trained) -> bool:
        return w.numel < self.minimal_size


OPTIMIZER = AdamWCpuOffload
EXAMPLES = (AdamWCpuOffload(), AdamWCpuOffload(offload_gradients=True), AdamWCpuOffload(minimal_size=0))
UNVERIFIED: dict[str, str] = {"costs": "torchao refuses to make it without a GPU; the counts are read off its code"}
