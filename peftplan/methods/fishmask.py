"""FISH mask: the weights of the largest Fisher information change, by a mask that is chosen once (Sung 2021,
arXiv:2111.09839, section 3).

Trains: `keep_ratio` of all weights; gradients and optimizer states are those of full fine-tuning.
Keeps for backward: as full fine-tuning.
Masks: one of every weight's own dtype and shape is held; each gradient is multiplied by it into a new tensor.
Not modelled: choosing the mask, before training begins.
Mirrors github.com/varunnair18/FISH, transformers/examples/text-classification/custom_trainer.py, training_step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.graph.core import Region, Tensor
from peftplan.methods._masked import Masked
from peftplan.units import DType

HARMLESS = frozenset({"num_samples", "grad_type", "mask_method"})


@final
@dataclass(frozen=True)
class Fishmask(Masked):
    libraries: ClassVar[tuple[str, ...]] = ("FISH",)
    title: ClassVar[str] = "fishmask"

    keep_ratio: float = 0.005

    @property
    def share(self) -> float:
        return self.keep_ratio

    def mask(self, region: Region | None, weight: Tensor) -> DType:
        del region
        return weight.dtype

    def aside(self, gradient_bytes: int) -> tuple[int, ...]:
        return (gradient_bytes,)


METHOD = Fishmask
EXAMPLES = (Fishmask(), Fishmask(keep_ratio=0.25))
UNVERIFIED: dict[str, str] = {}
