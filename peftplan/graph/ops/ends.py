"""The two ends of a model: the embedding, and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.graph.ops.shapes import KeepsResult, made


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Embedding(Op):
    """Row lookup: ins = (ids, W); keeps the ids where W trains; the gradient is dense."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (self.ins[0],) if self.ins[1].name in need else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return made(self.ins[1:], need)

    def moved_bytes(self) -> int:
        return 2 * self.out.nbytes


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class LogSoftmax(KeepsResult):
    """log_softmax: keeps its result."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class NllLoss(Op):
    """nll_loss: ins = (log-probabilities, labels); keeps both and the total weight; a full gradient in backward."""

    output_first = True

    total_weight: Tensor

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (*self.ins, self.total_weight) if self.ins[0].name in need else ()

    def scratch_bytes(self) -> int:
        return self.total_weight.nbytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return made(self.ins[:1], need)
