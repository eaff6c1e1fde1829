"""Matrix products: linear layers, plain and packed, and batched products."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, final

from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.graph.ops.shapes import Detached, made, wants

BITSANDBYTES = "bitsandbytes"
PLAIN = "torch.nn.Linear"
"""Whose weight is of a library's own tensor class."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Linear(Op):
    """y = x W^T (+ b): `mm` or `addmm`. ins = (x, W[, b]); x is flattened to two dimensions.

    Keeps x where W trains and W where x needs a gradient (mm: self, mat2). The weight's gradient is computed first.
    """

    views = True

    def flops(self) -> int:
        return 2 * self.ins[0].numel * self.out.shape[-1]

    def grad_flops(self, need: Need) -> int:
        return self.flops() * ((self.ins[0].name in need) + (self.ins[1].name in need))

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        x, w = self.ins[0], self.ins[1]
        return ((x,) if w.name in need else ()) + ((w,) if x.name in need else ())

    def backward(self, need: Need) -> tuple[Grad, ...]:
        x, w, *bias = self.ins
        size = self.out.dtype.size
        return tuple([Grad(t, t.numel * size) for t in (*bias, w, x) if t.name in need])


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class MatMul(Op):
    """Batched a @ b: `bmm`. ins = (a, b); `inner` is the contracted size. Keeps each where the other needs."""

    views = True

    inner: int

    def flops(self) -> int:
        return 2 * self.out.numel * self.inner

    def grad_flops(self, need: Need) -> int:
        return self.flops() * sum(t.name in need for t in self.ins)

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        a, b = self.ins
        return ((a,) if b.name in need else ()) + ((b,) if a.name in need else ())

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return made(self.ins[::-1], need)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class PackedLinear(Op):
    """y = x dequantize(W)^T (+ b) on a frozen packed weight: keeps nothing that autograd knows of, but `saves`.

    bitsandbytes puts the packed weight on the node itself, so a recomputation is not started for it; others save it
    (`weight`), the input that they do not read again (`input`), or both.

    `forward_workspace_bytes` and `backward_workspace_bytes` are the dequantized copies each pass makes.
    `keeps_input` where the kernel stashes its input on its node (bitsandbytes int8).
    """

    forward_workspace_bytes: int
    backward_workspace_bytes: int
    keeps_input: bool = False
    saves: tuple[Literal["input", "weight"], ...] = ()
    stashes = True
    adapters_clone: bool = False
    """Whether PEFT clones the output before adding its branch (lora/bnb.py, Linear4bit.forward)."""
    layer: str = BITSANDBYTES
    """Whose layer it is, which is what PEFT's tuners tell packed layers apart by."""

    def flops(self) -> int:
        return 2 * self.ins[0].numel * self.out.shape[-1]

    def grad_flops(self, need: Need) -> int:
        return self.flops() if self.ins[0].name in need else 0

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        if not self.saves or not wants(need, self.ins):
            return ()
        x, w = self.ins[:2]
        return tuple([x if what == "input" else w for what in self.saves])

    def stashed(self, need: Need) -> tuple[Tensor, ...]:
        return (self.ins[0],) if self.keeps_input and wants(need, self.ins) else ()

    def scratch_bytes(self) -> int:
        return self.forward_workspace_bytes

    def prepared_bytes(self) -> int:
        return self.forward_workspace_bytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        x, _, *bias = self.ins
        rows = self.out.numel // self.out.shape[0]  # bitsandbytes sums over the batch; the engine over the rest
        grads = [Grad(t, rows * t.dtype.size) for t in bias if t.name in need]
        if x.name in need:
            grads.append(Grad(x, x.nbytes, self.backward_workspace_bytes))
        return tuple(grads)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Unpack(Detached):
    """A packed weight as an ordinary one, made by operators of torch: ins = (packed,). A product that reads the result
    keeps it, as autograd keeps any operand. `layer`: as in PackedLinear."""

    layer: str
    temporary_bytes: int = 0

    def scratch_bytes(self) -> int:
        return self.temporary_bytes


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class DetachedLinear(Detached):
    """y = x W^T that is only read detached: its node dies before backward, so it keeps nothing and has no gradient."""

    temporary_bytes: int = 0

    def flops(self) -> int:
        return 2 * self.ins[0].numel * self.out.shape[-1]

    def scratch_bytes(self) -> int:
        return self.temporary_bytes


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Solve(Op):
    """torch.linalg.solve: ins = (A, B), matrices or batches of them; keeps A, the result, A's LU and its pivots.

    B's gradient is solved for too; A's is a product and its negative (FunctionsManual.cpp, linalg_solve_backward).
    """

    lu: Tensor
    pivots: Tensor
    multiplies_back = True

    def grad_flops(self, need: Need) -> int:
        return 2 * self.out.numel * self.out.shape[-1] if self.ins[0].name in need else 0

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (self.ins[0], self.lu, self.pivots, self.out) if self.ins[0].name in need else ()

    def scratch_bytes(self) -> int:
        return self.lu.nbytes + self.pivots.nbytes + 4 * prod(self.out.shape[:-2])

    def backward(self, need: Need) -> tuple[Grad, ...]:
        a, b = self.ins
        return (Grad(b, b.nbytes), Grad(a, a.nbytes, a.nbytes)) if a.name in need else ()
