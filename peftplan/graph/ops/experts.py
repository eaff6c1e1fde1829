"""What experts held as stacked matrices add: a product in groups of rows, and a gate over the halves of one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.graph.ops.names import internal
from peftplan.graph.ops.shapes import made, wants


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedLinear(Op):
    """torch._grouped_mm: rows of x, sorted by expert, times the matrix of their expert. ins = (x, W, offsets).

    Each row is multiplied once, however they are spread over experts. Keeps x where W trains, W where x needs a
    gradient, and the offsets; the weight's gradient is computed first and is as large as all experts
    (torch/tools/autograd/derivatives.yaml, _grouped_mm; native/GroupedBlas.cpp). torch counts no FLOPs for it: these
    are those of the products that it stands for.
    """

    def flops(self) -> int:
        return 2 * self.ins[0].numel * self.out.shape[-1]

    def grad_flops(self, need: Need) -> int:
        return self.flops() * ((self.ins[0].name in need) + (self.ins[1].name in need))

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        x, w, offsets = self.ins
        kept = ((x,) if w.name in need else ()) + ((w,) if x.name in need else ())
        return (*kept, offsets) if kept else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        x, w, _ = self.ins
        return made((w, x), need)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class GatedHalves(Op):
    """act(gate) * up, gate and up the halves of one tensor: `chunk`, an activation, a product.

    Keeps the tensor and the activation. Backward concatenates the halves' gradients (SplitBackward): at the highest
    point both of them and the whole, which is as much as the incoming gradient, what is kept of the activation and the
    whole.
    """

    def _act(self) -> Tensor:
        return internal(self.name, "act", self.out.shape, self.out.dtype)

    def scratch_bytes(self) -> int:
        return self._act().nbytes

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (*self.ins, self._act()) if wants(need, self.ins) else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return made(self.ins, need)
