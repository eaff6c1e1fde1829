"""Megatron-Core's optimizer: fp32 weights and Adam's states, dealt among ranks, and whole fp32 gradients.

core/distributed/param_and_grad_buffer.py: `main_grad` of every weight is a part of one fp32 buffer that is always
there; core/optimizer/distrib_optimizer.py: fp32 copies of weights and both moments are of a rank's share of that
buffer. The step (TE's FusedAdam) makes nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from peftplan.optimizers.base import Optimizer, State, Trained


@final
@dataclass(frozen=True)
class MegatronAdam(Optimizer):
    """Adam on a rank's `share` of all weights."""

    shares: int = 1

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        del backend
        for w in weights:
            yield State(4 * w.numel, w.copies)
            yield State(-(-w.numel // self.shares) * 4, 3 * w.copies)

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        del weights, backend
        return 0
