"""Partial fine-tuning: the last layers train, the rest is frozen (LLaMA-Factory's `freeze`).

Trains: every weight of the last `layers` decoder layers, and the modules named in `train`.
Keeps for backward: as full fine-tuning, in the trained layers; frozen layers below the first trained one keep nothing.
Not modelled: nothing known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.core import Graph
from peftplan.methods._layers import check_layers, outside, train_layers
from peftplan.methods.base import Family, Host, Method, Trains


@final
@dataclass(frozen=True)
class Freeze(Method):
    layers: int = 2
    """How many decoder layers train, counted from the top."""
    train: tuple[str, ...] = ()
    """Modules outside the layers that train too: model.norm, lm_head, model.embed_tokens."""
    splits: ClassVar[bool] = True
    family: ClassVar[Family] = "selective"
    libraries: ClassVar[tuple[str, ...]] = ("LLaMA-Factory",)
    trains: ClassVar[Trains] = "base"

    def apply(self, graph: Graph, host: Host) -> Graph:
        total = host.arch.num_layers
        check_layers("layers", self.layers, total, least=0)
        if not self.layers and not self.train:
            raise RequestError("method freeze trains nothing; set method.layers to at least 1 or method.train")
        first = total - self.layers
        return train_layers(graph, lambda i: i >= first, outside(self.train, host.arch), method="freeze")


METHOD = Freeze
EXAMPLES = (Freeze(), Freeze(layers=1, train=("lm_head",)))
UNVERIFIED: dict[str, str] = {}
