"""Megatron-Core's optimizer: fp32 weights and Adam's states, dealt among ranks, and whole fp32 gradients.

core/distributed/param_and_grad_buffer.py: `main_grad` of every weight is a part of one fp32 buffer that is always
there, and autograd is told of a matrix's gradient by a tensor of its shape that all such matrices share
(TransformerEngine, get_dummy_wgrad). core/optimizer/distrib_optimizer.py: fp32 copies of weights and both moments are
of a rank's share of that buffer. The step (TransformerEngine's FusedAdam) makes nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.optimizers.base import Optimizer, State, Trained


@final
@dataclass(frozen=True)
class MegatronAdam(Optimizer):
    """Adam on a rank's `share` of all weights."""

    shares: int = 1
    tied: bool = False
    """Whether the embedding is the head too."""
    holds_gradients: ClassVar[bool] = True

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        del backend
        shapes = set()
        for w in weights:
            yield State(4 * w.numel, w.copies)
            yield State(-(-w.numel // self.shares) * 4, 3 * w.copies)
            if w.is_matrix and (self.tied or not w.is_embedding):
                shapes.add((w.shape, w.bytes))
        yield from (State(size, 1) for _, size in sorted(shapes))

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        del weights, backend
        return 0
