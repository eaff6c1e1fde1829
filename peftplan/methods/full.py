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
from typing import Any, final

from peftplan.errors import RequestError
from peftplan.graph.core import Graph, Region, Tensor
from peftplan.graph.edit import train
from peftplan.methods.base import Host, Method

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
    def apply(self, graph: Graph, host: Host) -> Graph:
        for weight, _ in graph.params():
            if weight.stored_bytes is not None:
                raise RequestError(
                    f"method full cannot train packed weights ({weight.name.removeprefix('@')}); use an adapter method "
                    "such as lora, or an unquantized --format"
                )
        del host
        return train(graph, _everything)


def _everything(region: Region, weight: Tensor) -> bool:
    del region, weight
    return True


METHOD = Full
EXAMPLES = (Full(),)
UNVERIFIED: dict[str, str] = {}
