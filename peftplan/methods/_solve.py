"""torch.linalg.solve as a node: what BOFT's and OFT's exact Cayley transforms keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.builder import Builder
from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.graph.ops import internal
from peftplan.units import DType


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Solve(Op):
    """torch.linalg.solve of batches: ins = (A, B); keeps A, the result, A's LU and its pivots.

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
        return self.lu.nbytes + self.pivots.nbytes + 4 * self.out.shape[0]

    def backward(self, need: Need) -> tuple[Grad, ...]:
        a, b = self.ins
        return (Grad(b, b.nbytes), Grad(a, a.nbytes, a.nbytes)) if a.name in need else ()


def cayley(b: Builder, skew: Tensor) -> Tensor:
    """(I - S)(I + S)^-1 of skew-symmetric blocks, beside an fp32 identity; in fp32 at least."""
    eye = b.plain("identity", *skew.shape[-2:], dtype=DType.float32)
    plus = b.add(eye, skew, label="plus")
    minus = b.minus(eye, skew, label="minus")
    name = b.name("solved")
    lu = internal(name, "lu", skew.shape, plus.dtype)
    pivots = internal(name, "pivots", skew.shape[:-1], DType.int32)
    out = Tensor(name, skew.shape, plus.dtype)
    b.ops.append(Solve(name=name, ins=(plus, minus), out=out, lu=lu, pivots=pivots, part="down"))
    b.hold(skew, eye)
    return out
