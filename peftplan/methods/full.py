"""Full fine-tuning: every weight trains.

`galore`, `q_galore`, `apollo`, `lomo` and `adalomo` are names for it with the optimizer of that name, which is where
they differ: their --rank and --target-modules are the optimizer's `rank` and `optim_target_modules`.

Trains: everything.
Keeps for backward: the input of every linear layer and the normalised input of every norm, besides what the
activations' own formulas keep.
Not modelled: nothing known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from peftplan.graph.core import Graph, Region, Tensor
from peftplan.graph.edit import train
from peftplan.methods._layers import refuse_packed
from peftplan.methods.base import Family, Host, Method, Trains

OPTIMIZERS = {
    "galore": "galore_adamw",
    "q_galore": "q_galore",
    "apollo": "apollo_adamw",
    "lomo": "lomo",
    "adalomo": "adalomo",
}
"""Names that stand for full fine-tuning with an optimizer."""
VARIANTS: dict[str, dict[str, Any]] = {name: {} for name in OPTIMIZERS}


@final
@dataclass(frozen=True)
class Full(Method):
    splits: ClassVar[bool] = True
    family: ClassVar[Family] = "selective"
    libraries: ClassVar[tuple[str, ...]] = ("transformers",)
    trains: ClassVar[Trains] = "base"

    def apply(self, graph: Graph, host: Host) -> Graph:
        del host
        return refuse_packed(train(graph, _everything), "full")


def _everything(region: Region, weight: Tensor) -> bool:
    del region, weight
    return True


METHOD = Full
EXAMPLES = (Full(),)
UNVERIFIED: dict[str, str] = {}
