"""A library's own autograd function in place of several of torch's nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.graph.ops.shapes import wants


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Fused(Op):
    """One torch.autograd.Function: what it keeps, which gradients it makes and what it multiplies are stated here.

    Keeps `keeps` where any input needs a gradient; of `grads` makes those that are needed, in order. `also` are further
    outputs, each made by a `Further` before it; the function runs back when all their gradients have come, and holds
    them until it is done. Temporaries of the forward are `temporary_bytes`, what it makes and keeps included.
    """

    keeps: tuple[Tensor, ...] = ()
    grads: tuple[Grad, ...] = ()
    also: tuple[Tensor, ...] = ()
    temporary_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    multiplies_back = True

    def flops(self) -> int:
        return self.forward_flops

    def grad_flops(self, need: Need) -> int:
        return self.backward_flops if wants(need, self.ins) else 0

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


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Further(Op):
    """Another output of the `Fused` that follows, which takes its gradient."""

    def backward(self, need: Need) -> tuple[Grad, ...]:  # noqa: ARG002
        return ()


def _moved(grad: Grad, new: Mapping[str, Tensor]) -> Grad:
    over = None if grad.over is None else new.get(grad.over.name, grad.over)
    return grad._replace(to=new.get(grad.to.name, grad.to), over=over)
