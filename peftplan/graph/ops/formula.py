"""An op whose rule is stated where it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.graph.ops.shapes import wants


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Formula(Op):
    """An operator, or a library's autograd function, of one method.

    Keeps `keeps` where any input needs a gradient; of `grads` makes those that are needed, in order.
    """

    keeps: tuple[Tensor, ...] = ()
    grads: tuple[Grad, ...] = ()
    forward_flops: int = 0
    backward_flops: int = 0
    temporary_bytes: int = 0

    def flops(self) -> int:
        return self.forward_flops

    def grad_flops(self, need: Need) -> int:
        return self.backward_flops if wants(need, self.ins) else 0

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return self.keeps if wants(need, self.ins) else ()

    def scratch_bytes(self) -> int:
        return self.temporary_bytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple([g for g in self.grads if g.to.name in need])
