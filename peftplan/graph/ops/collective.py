"""What ranks that share one replica's operations tell each other, and the memory that this takes.

torch.distributed's functional collectives give a tensor of their own and leave what they are given
(torch/distributed/_functional_collectives.py); DTensor's redistribution puts them together
(torch/distributed/tensor/_redistribute.py, placement_types.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from peftplan.graph.core import Grad, Need, Op
from peftplan.graph.ops.shapes import HandsOn, handed_on

Kind = Literal["", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "slice"]
"""What is done; nothing at all, where the values are the ranks' already; a part is copied, which tells nobody."""
Group = Literal["tp", "cp", "ep"]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Collective(Op):
    """One value made another by all ranks of a group; keeps nothing. ins = (x,).

    Where nothing is done forward, what comes out is what went in, and where nothing is done backward the gradient is
    handed on. Otherwise both are tensors of their own.
    """

    forward: Kind
    back: Kind
    group: Group
    ranks: int
    temporary_bytes: int = 0
    grad_temporary_bytes: int = 0

    def scratch_bytes(self) -> int:
        return self.temporary_bytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        if not self.back:
            return handed_on(self.ins, need)
        x = self.ins[0]
        return (Grad(x, x.logical_bytes, self.grad_temporary_bytes),) if x.name in need else ()

    def moved_bytes(self) -> int:
        return 0 if not self.forward else self.ins[0].nbytes + self.out.nbytes

    def sent_bytes(self) -> int:
        """Bytes that the forward puts on a link of the group, each rank as many (rings: NCCL's all_reduce sends a
        part twice, the others once)."""
        return _sent(self.forward, self.ranks, max(self.ins[0].nbytes, self.out.nbytes))

    def sent_back_bytes(self) -> int:
        """Bytes that the backward does."""
        return _sent(self.back, self.ranks, max(self.ins[0].nbytes, self.out.nbytes))


def _sent(kind: Kind, ranks: int, whole: int) -> int:
    if kind in ("", "slice"):
        return 0
    return (2 if kind == "all_reduce" else 1) * whole * (ranks - 1) // ranks


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Whole(HandsOn):
    """A weight of which a rank holds a part, as a formula sees it whose gradient of it comes out whole: DTensor leaves
    it so (embedding_dense_backward on replicated gradients). No bytes forward."""

    narrows = True

    def moved_bytes(self) -> int:
        return 0
