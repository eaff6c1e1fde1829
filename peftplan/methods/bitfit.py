"""BitFit: only the biases train (Ben Zaken 2021, arXiv:2106.10199, section 3).

Trains: every bias of the model, or those of the modules named in `train`.
Keeps for backward: nothing for the biases themselves; what the layers above the lowest one keep to pass gradients on.
Not modelled: biases that the architecture does not have (PEFT's BEFT adds them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.core import Graph, Region, Tensor
from peftplan.graph.edit import train
from peftplan.methods.base import Family, Host, Method, Trains


@final
@dataclass(frozen=True)
class BitFit(Method):
    train: tuple[str, ...] | None = None
    """Names of the modules whose bias trains (`q_proj`); None: all."""
    splits: ClassVar[bool] = True
    family: ClassVar[Family] = "selective"
    libraries: ClassVar[tuple[str, ...]] = ("transformers",)
    trains: ClassVar[Trains] = "base"

    def apply(self, graph: Graph, host: Host) -> Graph:
        biases = {_module(t) for t, _ in graph.params() if t.name.endswith(".bias")}
        if not biases:
            raise RequestError(
                f"method bitfit: {host.arch.family} models with this config have no biases; use ln_tuning or lora"
            )
        for name in self.train or ():
            if not any(_named(path, name) for path in biases):
                names = sorted({path.rsplit(".", 1)[-1] for path in biases})
                raise RequestError(f"method.train: {name!r} has no bias; this model has them on {', '.join(names)}")
        return train(graph, self._trains)

    def _trains(self, region: Region, weight: Tensor) -> bool:
        del region
        if not weight.name.endswith(".bias"):
            return False
        return self.train is None or any(_named(_module(weight), name) for name in self.train)


def _module(bias: Tensor) -> str:
    return bias.name.removeprefix("@").removesuffix(".bias")


def _named(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


METHOD = BitFit
EXAMPLES = (BitFit(), BitFit(train=("q_proj",)))
UNVERIFIED: dict[str, str] = {
    "model without biases": "refused by design, so examples run only on models that have some",
}
