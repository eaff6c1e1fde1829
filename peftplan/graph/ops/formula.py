"""Nodes whose rule is stated where they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.graph.ops.shapes import wants


@dataclass(frozen=True, kw_only=True, slots=True)
class Stated(Op):
    """An op that says of itself what it keeps and which gradients it makes.

    Keeps `keeps` where any input needs a gradient; of `grads` makes those that are needed, in order.
    """

    keeps: tuple[Tensor, ...] = ()
    grads: tuple[Grad, ...] = ()
    temporary_bytes: int = 0

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return self.keeps if wants(need, self.ins) else ()

    def over(self, ins: tuple[Tensor, ...], out: Tensor) -> Op:
        new = {old.name: t for old, t in zip((*self.ins, self.out), (*ins, out), strict=True)}
        keeps = tuple(new.get(t.name, t) for t in self.keeps)
        return replace(self, ins=ins, out=out, keeps=keeps, grads=tuple(_moved(g, new) for g in self.grads))

    def scratch_bytes(self) -> int:
        return self.temporary_bytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple(g for g in self.grads if g.to.name in need)


def _moved(grad: Grad, new: Mapping[str, Tensor]) -> Grad:
    over = None if grad.over is None else new.get(grad.over.name, grad.over)
    return grad._replace(to=new.get(grad.to.name, grad.to), over=over)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Formula(Stated):
    """An operator, or a library's autograd function, of one method alone."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Hooked(Op):
    """A parameter whose gradient is made anew by a hook when it has arrived (Tensor.register_hook); no bytes forward.

    It stands right before the first op that reads the parameter: so it runs back when the last has, as a hook does
    (torch/csrc/autograd/engine.cpp: a leaf's accumulation goes before every other node).
    """

    multiplies_back = True

    hook_flops: int
    temporary_bytes: int

    def grad_flops(self, need: Need) -> int:
        return self.hook_flops if self.ins[0].name in need else 0

    def moved_bytes(self) -> int:
        return 0

    def backward(self, need: Need) -> tuple[Grad, ...]:
        weight = self.ins[0]
        return (Grad(weight, weight.logical_bytes, self.temporary_bytes),) if weight.name in need else ()
