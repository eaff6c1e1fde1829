"""What many formulas have in common: where a gradient comes from, and which end of an op is kept."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

from peftplan.graph.core import Grad, Need, Op, Tensor


def wants(need: Need, tensors: tuple[Tensor, ...]) -> bool:
    """Whether one of them requires a gradient."""
    return any(t.name in need for t in tensors)


def handed_on(ins: tuple[Tensor, ...], need: Need) -> tuple[Grad, ...]:
    """The incoming gradient itself, or a view of it, for every input that needs one."""
    return tuple([Grad(t, 0) for t in ins if t.name in need])


def made(ins: tuple[Tensor, ...], need: Need) -> tuple[Grad, ...]:
    """A new gradient of its own shape and dtype for every input that needs one."""
    return tuple([Grad(t, t.logical_bytes) for t in ins if t.name in need])


@dataclass(frozen=True, kw_only=True, slots=True)
class Unary(Op, ABC):
    """One input, and for it a new gradient of its shape and dtype; keeps nothing."""

    def grad_scratch_bytes(self) -> int:
        """Temporaries of the backward's formula."""
        return 0

    def backward(self, need: Need) -> tuple[Grad, ...]:
        x = self.ins[0]
        return (Grad(x, x.logical_bytes, self.grad_scratch_bytes()),) if x.name in need else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepsInput(Unary, ABC):
    """Its formula reads what went in."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return self.ins if self.ins[0].name in need else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepsResult(Unary, ABC):
    """Its formula reads what came out."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (self.out,) if self.ins[0].name in need else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class HandsOn(Op, ABC):
    """Its gradient is the incoming one for every input; keeps nothing."""

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return handed_on(self.ins, need)


@dataclass(frozen=True, kw_only=True, slots=True)
class Detached(Op, ABC):
    """Nothing flows back through it."""

    differentiable = False

    def backward(self, need: Need) -> tuple[Grad, ...]:  # noqa: ARG002
        return ()
