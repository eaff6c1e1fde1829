"""Elementwise formulas and reductions over the last dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.graph.ops.shapes import HandsOn, KeepsInput, KeepsResult, Unary


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Mul(Op):
    """Elementwise a * b with broadcasting and type promotion. Keeps each where the other needs a gradient."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        a, b = self.ins
        return ((a,) if b.name in need else ()) + ((b,) if a.name in need else ())

    def backward(self, need: Need) -> tuple[Grad, ...]:
        full = self.out.nbytes
        return tuple([Grad(t, full) for t in self.ins if t.name in need])


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Div(Op):
    """Elementwise a / b. Keeps b where a needs; a and b where b needs (div: self, other)."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        a, b = self.ins
        if b.name in need:
            return (a, b)
        return (b,) if a.name in need else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        a, b = self.ins
        full = self.out.nbytes
        grads = [Grad(a, full)] if a.name in need else []
        if b.name in need:
            grads.append(Grad(b, full, 2 * full))
        return tuple(grads)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Add(HandsOn):
    """a + b (add, sub): keeps nothing; hands the incoming gradient on to both."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class AddConst(HandsOn):
    """a + constant: keeps nothing; hands the incoming gradient on."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Scale(Unary):
    """a * constant: keeps nothing; the gradient is scaled into a new tensor."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Square(KeepsInput):
    """x^2 (pow_backward: grad * (2 * x^1)); keeps x; two temporaries of x's size in backward."""

    pieces = 2

    def grad_scratch_bytes(self) -> int:
        return 2 * self.ins[0].nbytes


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class MeanLast(Unary):
    """Mean over the last dimension: keeps sizes only; the gradient is expanded and divided into a new tensor."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Rsqrt(KeepsResult):
    """1 / sqrt(x): keeps its result (rsqrt: -0.5 * grad * result^3; two temporaries)."""

    pieces = 2

    def grad_scratch_bytes(self) -> int:
        return 2 * self.ins[0].nbytes


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Activate(KeepsInput):
    """silu, gelu: keeps its input; one kernel backward (silu_backward, gelu_backward)."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Squash(KeepsResult):
    """tanh, sigmoid, relu: keeps its result; one kernel backward (tanh_backward, threshold_backward on `result`)."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Dropout(Unary):
    """Dropout in training. CUDA's fused kernel keeps a one-byte mask (native_dropout); the CPU path multiplies by
    noise of the input's dtype and keeps that (aten/src/ATen/native/Dropout.cpp)."""

    output_first = True

    mask: Tensor

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (self.mask,) if self.ins[0].name in need else ()

    def scratch_bytes(self) -> int:
        return self.mask.nbytes
