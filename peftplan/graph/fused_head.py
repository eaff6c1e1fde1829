"""The output head and the loss in one function that never holds all logits.

TRL 1.16.0, trl/trainer/utils.py, add_fused_lm_head, and trl/kernels/chunked_logprob.py, ChunkedLogProbFunction: rows of
hidden states are projected in tiles of 4,096 tokens by 32,768 words; the backward computes each tile again and sums the
gradients in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.units import DType

TILE_TOKENS, TILE_WORDS = 4096, 32768
_STATISTICS = 7
"""fp32 numbers a token while a forward runs: maxima, sums and the target's logit."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class PickRows(Op):
    """`x[mask]`: keeps the mask; the gradient is scattered into zeros (index_put_ with accumulate, which sorts)."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return self.ins[1:] if self.ins[0].name in need else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        x = self.ins[0]
        rows = self.out.numel // self.out.shape[-1]
        indices = 5 * rows * DType.int64.size  # where the mask holds, and three copies of it to sort
        return (Grad(x, x.nbytes, indices),) if x.name in need else ()


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class FusedHead(Op):
    """Log-probabilities (N,) of targets (N,) given rows (N, H) and a head (V, H). ins = (rows, head, targets).

    Keeps the rows, the head, the targets, `log_z` and the `entropy` that is logged, each (N,) in fp32. On the CPU
    every tile has temporaries in fp32 besides, which are left out: errs low there.
    """

    compute: DType
    log_z: Tensor
    entropy: Tensor

    def flops(self) -> int:
        return 2 * self.ins[0].numel * self.ins[1].shape[0]

    def grad_flops(self, need: Need) -> int:
        wanted = sum(t.name in need for t in self.ins[:2])
        return self.flops() * (wanted + 1) if wanted else 0

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (*self.ins, self.log_z, self.entropy) if any(t.name in need for t in self.ins) else ()

    def scratch_bytes(self) -> int:
        return self._tile_bytes() + _STATISTICS * self.log_z.nbytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        wanted = [t for t in self.ins[:2] if t.name in need]
        scratch = self._tile_bytes() + sum(_summing_bytes(t) for t in wanted)
        return tuple(Grad(t, t.logical_bytes, scratch) for t in wanted)

    def _tile_bytes(self) -> int:
        """The buffer of one tile, as wide as a tile whatever the vocabulary, and operands in another dtype's copies."""
        rows, head = self.ins[:2]
        tokens, words = min(rows.shape[0], TILE_TOKENS), min(head.shape[0], TILE_WORDS)
        copied = tokens * (rows.dtype is not self.compute) + words * (head.dtype is not self.compute)
        return (tokens * TILE_WORDS + copied * rows.shape[1]) * self.compute.size


def _summing_bytes(t: Tensor) -> int:
    """The fp32 sum of a gradient, where it is not the gradient itself."""
    return 0 if t.dtype is DType.float32 else t.numel * DType.float32.size
