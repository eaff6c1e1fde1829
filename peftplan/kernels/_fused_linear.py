"""The output head and the loss in one function that makes its gradients in the forward, chunk by chunk of tokens.

liger-kernel 0.8.5, ops/fused_linear_cross_entropy.py: logits of as many tokens at a time as keep them near the size of
the hidden states; the gradients of the hidden states, and of the head where it trains, are what backward is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.builder import Builder
from peftplan.graph.core import ACTIVATION, Grad, Need, Op, Tensor
from peftplan.graph.ops import internal
from peftplan.graph.ops.shapes import wants
from peftplan.units import DType

FP32 = DType.float32


def chunk_tokens(tokens: int, width: int, vocab: int) -> int:
    """How many tokens' logits exist at once."""
    factor = -(-vocab // width)
    return min(tokens, 1 << (-(-tokens // factor) - 1).bit_length())


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class FusedLinearCrossEntropy(Op):
    """ins = (rows (N, H), head (V, H), targets (N,)); keeps `row_grads` (N, H) and, where the head trains, `head_grads`
    (V, H), over which nothing more is made in backward unless they are `fresh`.

    `compute` is the dtype of the products. `upcast`: Liger's first releases (0.4, which fms-acceleration took over)
    made an fp32 copy of each chunk's logits, and scaled its gradient into another. Products are counted as if the
    hidden states needed a gradient, which they do in any training by backpropagation.
    """

    compute: DType
    row_grads: Tensor
    head_grads: Tensor
    cpu: bool = False
    upcast: bool = False
    accumulate: DType | None = None
    """The dtype in which the head's gradient is summed, where it is not the head's own."""
    tile_bytes: int | None = None
    """What logits take at a time, where that is another rule than Liger's."""
    fresh: bool = False
    """Whether backward scales the gradients into new tensors."""

    @property
    def _trains_head(self) -> bool:
        return self.ins[1].trainable

    def flops(self) -> int:
        return 2 * self.ins[0].numel * self.ins[1].shape[0] * (2 + self._trains_head)

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        if not wants(need, self.ins):
            return ()
        return (self.row_grads, self.head_grads) if self.ins[1].name in need else (self.row_grads,)

    def backward(self, need: Need) -> tuple[Grad, ...]:
        pairs = ((self.ins[0], self.row_grads), (self.ins[1], self.head_grads))
        return tuple(Grad(t, made.nbytes, 0, None if self.fresh else made) for t, made in pairs if t.name in need)

    def scratch_bytes(self) -> int:
        lasting = self.row_grads.nbytes + self.ins[0].shape[0] * (FP32.size + 1)  # losses, which targets count
        if self.tile_bytes is not None:
            return lasting + self._summed_bytes() + self.tile_bytes - self.out.nbytes
        later = self._cached_bytes() if self._chunk() < self.ins[0].shape[0] else 0
        highest = max(self._at_logits() + later, self._at_products())
        return lasting + self._summed_bytes() + highest - self.out.nbytes  # the loss comes when they have gone

    def _summed_bytes(self) -> int:
        if not self._trains_head:
            return 0
        return self.ins[1].numel * (self.accumulate or self.ins[1].dtype).size

    def _chunk(self) -> int:
        rows, head = self.ins[:2]
        return chunk_tokens(rows.shape[0], rows.shape[1], head.shape[0])

    def _casts(self) -> int:
        """Operands in another dtype are cast for every product: the head's copy is the larger."""
        return self.ins[1].numel * self.compute.size if self.ins[1].dtype is not self.compute else 0

    def _cached_bytes(self) -> int:
        """Autocast keeps the copy of a trained fp32 head that the second product of a chunk asks for; the first asks
        for the transposed head's, which it does not keep (aten/src/ATen/autocast_mode.cpp, cached_cast)."""
        return self._casts() if self._trains_head and self.ins[1].dtype is FP32 else 0

    def _at_logits(self) -> int:
        logits = self._chunk() * self.ins[1].shape[0]
        rows = self._chunk() * self.ins[0].shape[1] * self.compute.size
        cast = self._casts() + (rows if self.ins[0].dtype is not self.compute else 0)
        if self.upcast:  # half, fp32, half again, scaled: two of them at a time
            return logits * (self.compute.size + FP32.size)
        return logits * self.compute.size + cast

    def _at_products(self) -> int:
        """The gradient of a chunk's hidden states, and that of the head where no kernel adds it in place."""
        logits = self._chunk() * self.ins[1].shape[0] * self.compute.size
        rows = self._chunk() * self.ins[0].shape[1] * self.compute.size
        head = 0
        if self._trains_head and self.cpu:
            size = self.ins[1].numel
            head = size * self.compute.size + (size * FP32.size if self.compute is not FP32 else 0)
        copies = 2 if self.upcast else 1
        cached = self._cached_bytes()
        return copies * logits + max(rows + (cached or self._casts()), head + cached)


def fused_loss(
    b: Builder,
    rows: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    accumulate: DType | None = None,
    upcast: bool = False,
    tile_bytes: int | None = None,
) -> Tensor:
    """The scalar loss of (N, H) rows."""
    loss = Tensor("loss", (), FP32, ACTIVATION)
    b.ops.append(
        FusedLinearCrossEntropy(
            name="loss",
            ins=(rows, head, targets),
            out=loss,
            compute=b.numerics.autocast or rows.dtype,
            row_grads=internal("loss", "grad_input", rows.shape, rows.dtype),
            head_grads=internal("loss", "grad_weight", head.shape, head.dtype),
            cpu=b.numerics.backend == "cpu",
            upcast=upcast,
            accumulate=accumulate,
            tile_bytes=tile_bytes,
            fresh=tile_bytes is not None,
            site="head",
            part="extra",  # no module of its own: PEFT wraps a head that this function then bypasses
        )
    )
    return loss
