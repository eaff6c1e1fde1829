"""LoRA-FA: LoRA with A frozen at its random start (Zhang 2023, arXiv:2308.03303, section 3).

Trains: r out per adapted linear layer; plus `bias`, `lora_bias` and copies of `modules_to_save`.
Keeps for backward: the output of A (r per token); not its input. A mask where there is dropout.
Not modelled: the temporaries of PEFT's LoraFAOptimizer (products of A with itself, one layer at a time): its states
are AdamW's for B, its step is taken for AdamW's, which errs high.
Mirrors peft/optimizers/lorafa.py create_lorafa_optimizer, peft 0.21.2, which freezes A of a plain LoRA model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.graph.core import Graph, Region, Tensor
from peftplan.graph.edit import train
from peftplan.methods import lora
from peftplan.methods._lora_knobs import LoraKnobs
from peftplan.methods.base import Host

HARMLESS = lora.HARMLESS


@final
@dataclass(frozen=True)
class LoraFa(LoraKnobs):
    """The settings of PEFT's LoraConfig that go with LoraFAOptimizer."""

    splits: ClassVar[bool] = True

    def apply(self, graph: Graph, host: Host) -> Graph:
        return train(self.plain().apply(graph, host), _trains)


def _trains(region: Region, weight: Tensor) -> bool:
    del region
    return weight.trainable and not weight.name.endswith(".lora_A.weight")


METHOD = LoraFa
EXAMPLES = (LoraFa(), LoraFa(r=3, target_modules="all-linear", lora_dropout=0.1))
UNVERIFIED: dict[str, str] = {}
