"""Matrix products of torchao's float8 training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.graph.ops.shapes import wants

CASTING = 9
"""Bytes per element at the highest point of a cast to float8: the scaled fp32 copy, its clamped copy and the result
(torchao 0.18, float8/float8_training_tensor.py, _ToFloat8ConstrFunc; float8_utils.py, to_fp8_saturated)."""

SCALE = 4
"""Bytes of a scale; the product makes each one's inverse."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Float8Linear(Op):
    """y = x W^T in float8 with dynamic scales for whole tensors (torchao 0.18, float8/float8_linear.py,
    matmul_with_hp_or_float8_args). ins = (x, W), both in high precision.

    A Python function, which keeps both whoever needs a gradient, and computes both gradients. float8 copies live for
    one pass: x, then W, in forward; the gradient, W, the gradient again and x in backward, where what a product wants
    in the other order is copied once more.
    """

    saves_late = True

    def flops(self) -> int:
        return 2 * self.ins[0].numel * self.out.shape[-1]

    def grad_flops(self, need: Need) -> int:
        return 2 * self.flops() if wants(need, self.ins) else 0

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return self.ins if wants(need, self.ins) else ()

    def scratch_bytes(self) -> int:
        x, w = (t.numel for t in self.ins)
        made = self.out.nbytes
        return max(CASTING * x + SCALE, x + CASTING * w + 2 * SCALE, x + w + made + 4 * SCALE) - made

    def prepared_bytes(self) -> int:
        x, w = (t.numel for t in self.ins)
        return max(CASTING * x, x + CASTING * w) + 2 * SCALE

    def backward(self, need: Need) -> tuple[Grad, ...]:
        """The gradient of x is there first; both float8 gradients and the float8 W live to the end."""
        of_x, of_w = self.ins
        x, w, g = of_x.numel, of_w.numel, self.out.numel
        grads = []
        if of_x.name in need:
            grad_x = x * self.out.dtype.size
            high = max(CASTING * g + SCALE, g + CASTING * w + 2 * SCALE, g + 2 * w + grad_x + 4 * SCALE)
            grads.append(Grad(of_x, grad_x, high - grad_x))
        if of_w.name in need:
            grad_w = w * self.out.dtype.size
            high = max(CASTING * g + SCALE, g + CASTING * x + 2 * SCALE, 2 * g + 2 * x + grad_w + 4 * SCALE)
            grads.append(Grad(of_w, grad_w, g + w + 2 * SCALE + high - grad_w))
        return tuple(grads)
