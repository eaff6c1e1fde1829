"""LISA: a few layers, drawn anew every so many steps, train with all that lies outside of the layers (Pan 2024,
arXiv:2403.17919, algorithm 1).

Trains: every weight of `activated_layers` decoder layers at a time, the embedding, the last norm and the head.
Keeps for backward: as full fine-tuning, in the layers that train; the others keep what passes gradients on.
States: `active` are those of the layers that train. So the paper; so in bytes ms-swift too, whose optimizer is made
over the layers drawn first and never hears of another (swift/callbacks/lisa.py and trainers/mixin.py, 4.6.0). `all`:
the optimizer is made over every weight, and keeps the states of every layer that ever trained, in the end all of them
(axolotl 0.19.0, utils/callbacks/lisa.py, and LMFlow's own callback).
Not modelled: layers that are no neighbours. Of equal layers the last ones are the worst: what frozen layers keep lies
below, all of it, when the last gradient of theirs is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.arch.core import Arch
from peftplan.graph.core import Graph
from peftplan.graph.edit import train
from peftplan.methods._layers import check_layers, every, train_layers
from peftplan.methods.base import Family, Host, Method, Trains

HARMLESS = frozenset({"step_interval"})
States = Literal["active", "all"]


@final
@dataclass(frozen=True)
class Lisa(Method):
    splits: ClassVar[bool] = True
    family: ClassVar[Family] = "memory-frugal"
    libraries: ClassVar[tuple[str, ...]] = ("ms-swift", "Axolotl")
    trains: ClassVar[Trains] = "base"

    activated_layers: int = 2
    """ms-swift's lisa_activated_layers, Axolotl's lisa_n_layers."""
    states: States = "active"

    def stages(self, arch: Arch) -> tuple[Method, ...]:
        total, count = arch.num_layers, self.activated_layers
        check_layers("activated_layers", count, total)
        first, last = (_Drawn(start, count, self.states) for start in (0, total - count))
        return (last,) if count == total else (first, last)

    def apply(self, graph: Graph, host: Host) -> Graph:
        return self.stages(host.arch)[-1].apply(graph, host)


@final
@dataclass(frozen=True)
class _Drawn(Method):
    """The stage in which `count` layers from the one numbered `first` train."""

    first: int
    count: int
    states: States

    @property
    def stage(self) -> str:
        last = self.first + self.count - 1
        return f"layer {last}" if self.count == 1 else f"layers {self.first} to {last}"

    def remembered(self, graph: Graph) -> Graph:
        return train(graph, lambda _, __: True) if self.states == "all" else graph

    def apply(self, graph: Graph, host: Host) -> Graph:
        del host
        drawn = range(self.first, self.first + self.count)
        return train_layers(graph, lambda i: i in drawn, every, method="lisa")


METHOD = Lisa
EXAMPLES = (Lisa(activated_layers=1), Lisa(activated_layers=2, states="all"))
UNVERIFIED: dict[str, str] = {}
