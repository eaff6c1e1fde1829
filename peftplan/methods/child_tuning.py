"""Child-Tuning: a part of each gradient reaches the optimizer, drawn anew every step (F) or chosen once by Fisher
information (D) (Xu 2021, arXiv:2109.05687, section 3).

Trains: `reserve_p` of all weights; gradients and optimizer states are those of full fine-tuning.
Keeps for backward: as full fine-tuning.
Masks: D holds a byte of every weight inside the layers, and multiplies gradients in place; F holds none, and makes
three tensors of a gradient's size for a moment.
Not modelled: choosing the mask of D, before training begins.
Mirrors github.com/PKUnlp-icler/ChildTuning, ChildTuningOptimizer.py and ChildTuningD.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.graph.core import Region, Tensor
from peftplan.methods._masked import Masked
from peftplan.units import DType


@final
@dataclass(frozen=True)
class ChildTuning(Masked):
    libraries: ClassVar[tuple[str, ...]] = ("ChildTuning",)
    title: ClassVar[str] = "child_tuning"

    mode: Literal["F", "D"] = "F"
    reserve_p: float = 0.3

    @property
    def share(self) -> float:
        return self.reserve_p

    def mask(self, region: Region | None, weight: Tensor) -> DType | None:
        del weight
        return DType.boolean if self.mode == "D" and region is not None else None

    def aside(self, gradient_bytes: int) -> tuple[int, ...]:
        return (gradient_bytes,) * 3 if self.mode == "F" else ()


METHOD = ChildTuning
EXAMPLES = (ChildTuning(), ChildTuning(mode="D", reserve_p=0.1))
UNVERIFIED: dict[str, str] = {}
