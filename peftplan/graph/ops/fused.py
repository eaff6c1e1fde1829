"""A library's own autograd function in place of several of torch's nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.graph.ops.formula import Stated
from peftplan.graph.ops.shapes import wants


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Fused(Stated):
    """One torch.autograd.Function: what it keeps, which gradients it makes and what it multiplies are stated here.

    Keeps `keeps` where any input needs a gradient; of `grads` makes those that are needed, in order. `also` are further
    outputs, each made by a `Further` before it; the function runs back when all their gradients have come, and holds
    them until it is done. Temporaries of the forward are `temporary_bytes`, what it makes and keeps included.
    """

    also: tuple[Tensor, ...] = ()
    forward_flops: int = 0
    backward_flops: int = 0
    multiplies_back = True

    def flops(self) -> int:
        return self.forward_flops

    def grad_flops(self, need: Need) -> int:
        return self.backward_flops if wants(need, self.ins) else 0


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Further(Op):
    """Another output of the `Fused` that follows, which takes its gradient."""

    def backward(self, need: Need) -> tuple[Grad, ...]:  # noqa: ARG002
        return ()
