"""What attention adds to products and casts: softmax, and the fused kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.graph.ops.shapes import KeepsResult, wants


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Softmax(KeepsResult):
    """softmax over the last dimension: keeps its result.

    CUDA's backward makes `grad * output` beside the gradient (`product`; aten/src/ATen/native/cuda/SoftMax.cu,
    softmax_backward_cuda_out), the CPU's does not.
    """

    output_first = True

    product: bool = False
    temporary_bytes: int = 0

    def scratch_bytes(self) -> int:
        return self.temporary_bytes

    def grad_scratch_bytes(self) -> int:
        return self.out.nbytes if self.product else 0


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class FusedAttention(Op):
    """Fused attention: ins = (q, k, v); keeps q, k, v, the output and the log-sum-exp (Dao 2022, arXiv:2205.14135).

    q is (B, N, S, D), out as wide as the values. FLOPs as flop_counter.sdpa_flop: the whole score matrix, causal or
    not; backward five products (two of them the recomputed scores and their gradient).
    """

    output_first = True

    kv_len: int
    extras: tuple[Tensor, ...] = field(default=())
    """Tensors the kernel makes and keeps: log-sum-exp, generator state, the additive bias."""
    workspace_bytes: int = 0
    grad_workspace_bytes: int = 0

    def flops(self) -> int:
        return 2 * (self.ins[0].numel + self.out.numel) * self.kv_len

    def grad_flops(self, need: Need) -> int:
        each = 3 * self.ins[0].numel + 2 * self.out.numel
        return 2 * each * self.kv_len if wants(need, self.ins) else 0

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (*self.ins, self.out, *self.extras) if wants(need, self.ins) else ()

    def scratch_bytes(self) -> int:
        return sum(t.nbytes for t in self.extras) + self.workspace_bytes

    def returned(self) -> tuple[Tensor, ...]:
        """All but the bias, which is made before."""
        return (self.out, *(t for t in self.extras if not t.name.endswith(".bias")))

    def prepared_bytes(self) -> int:
        return sum(t.nbytes for t in self.extras if t.name.endswith(".bias"))

    def backward(self, need: Need) -> tuple[Grad, ...]:
        if not wants(need, self.ins):
            return ()
        *firsts, last = self.ins
        return (*(Grad(t, t.nbytes) for t in firsts), Grad(last, last.nbytes, self.grad_workspace_bytes))
