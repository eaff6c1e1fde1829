"""Layers are checkpointed, but the results of chosen operators stay (torch.utils.checkpoint's
create_selective_checkpoint_contexts).

`save` names operators as aten does (`mm`, `addmm`, `bmm`) or the group `attention`: the fused kernels, with their
log-sum-exp. `every_second_mm`: of a layer's `mm`, every second is recomputed after all. The defaults are torchtitan's
(distributed/activation_checkpoint.py, SelectiveAC, 2026-08); Axolotl's `selective_checkpointing` saves `attention`.
All that a kept operator returns stays, whether or not backward needs it. The collectives of torchtitan's list do not
run on one GPU, and its `max`, one number for each tensor cast to float8, is left out.
Not modelled: operators inside a method's own formulas, which count as recomputed; torchtitan's `early_stop=False`,
which runs each layer to its end a second time (FLOPs err low by a down projection at most).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from peftplan.graph.core import Op, Region
from peftplan.graph.ops import DetachedLinear, Float8Linear, FusedAttention, Linear, MatMul, PackedLinear
from peftplan.recompute.base import Checkpoint, Recompute

OPERATORS = ("mm", "addmm", "bmm", "attention")


@final
@dataclass(frozen=True)
class Selective(Recompute):
    save: tuple[str, ...] = OPERATORS
    """Operators whose results stay."""
    every_second_mm: bool = True
    """Whether every second `mm` of a layer is recomputed although it is among them."""

    def checkpoint(self, region: Region, index: int, depth: int) -> Checkpoint | None:
        del index, depth
        return replace(self.whole(), cached=self.kept(region.ops))

    def kept(self, ops: Sequence[Op]) -> frozenset[int]:
        """Indices of the ops whose results stay."""
        found = [(i, operator(op)) for i, op in enumerate(ops)]
        products = [i for i, name in found if name == "mm"]
        again = products[1::2] if self.every_second_mm else []
        return frozenset(i for i, name in found if name in self.save) - frozenset(again)

    def refusal(self) -> str | None:
        if self.use_reentrant:
            return "recompute.use_reentrant=true: torch selects operators only where it is false; leave it out"
        unknown = [name for name in self.save if name not in OPERATORS]
        if unknown:
            return f"recompute.save: {unknown[0]!r} is not among {', '.join(OPERATORS)}"
        return None if self.save else "recompute.save is empty: that is --recompute full"


def operator(op: Op) -> str:
    """The aten operator that an op runs; of packed weights, the product with the unpacked copy; of float8 ones, the
    one that torch sees: the product of the subclass that wraps them."""
    if isinstance(op, (Linear, PackedLinear)):
        return "addmm" if len(op.ins) > 2 else "mm"
    if isinstance(op, (DetachedLinear, Float8Linear)):
        return "mm"
    if isinstance(op, MatMul):
        return "bmm"
    return "attention" if isinstance(op, FusedAttention) else ""


RECOMPUTE = Selective
EXAMPLES = (Selective(), Selective(save=("attention",)), Selective(save=("mm", "bmm"), every_second_mm=False))
UNVERIFIED: tuple[str, ...] = ()
