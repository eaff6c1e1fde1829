"""LoRA-FA: LoRA with A frozen at its random start (Zhang 2023, arXiv:2308.03303, section 3).

Trains: r out per adapted linear layer; plus `bias`, `lora_bias` and copies of `modules_to_save`.
Keeps for backward: the output of A (r per token); not its input. A mask where there is dropout.
Not modelled: the temporaries of PEFT's LoraFAOptimizer (products of A with itself, one layer at a time): its states
are AdamW's for B, its step is taken for AdamW's, which errs high.
Mirrors peft/optimizers/lorafa.py create_lorafa_optimizer, peft 0.21.2, which freezes A of a plain LoRA model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, final

from peftplan.graph.core import Graph, Region, Tensor
from peftplan.graph.edit import train
from peftplan.methods import lora
from peftplan.methods.base import Family, Host, Method
from peftplan.methods.targets import DEFAULTS, Names

HARMLESS = lora.HARMLESS


@final
@dataclass(frozen=True)
class LoraFa(Method):
    """The settings of PEFT's LoraConfig that go with LoraFAOptimizer."""

    r: int = 8
    target_modules: Names = None
    exclude_modules: Names = None
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    family: ClassVar[Family] = "reparameterized"

    def default_targets(self, family: str) -> Names:
        return DEFAULTS.get(family)

    def apply(self, graph: Graph, host: Host) -> Graph:
        plain = lora.Lora(**{knob.name: getattr(self, knob.name) for knob in fields(self)})
        return train(plain.apply(graph, host), _trains)


def _trains(region: Region, weight: Tensor) -> bool:
    del region
    return weight.trainable and not weight.name.endswith(".lora_A.weight")


METHOD = LoraFa
EXAMPLES = (LoraFa(), LoraFa(r=3, target_modules="all-linear", lora_dropout=0.1))
UNVERIFIED: dict[str, str] = {}
