"""MeZO: no gradients; two forward passes with all weights moved by the same random numbers to either side (Malladi
2023, arXiv:2305.17333, algorithm 1).

Trains: everything.
Keeps for backward: nothing, as there is none; nothing at all lives longer than its last use.
States: none, and no part of an optimizer's; each weight in turn is moved by numbers drawn anew from a seed, four
tensors of its size alive at the most.
Not modelled: MeZO on LoRA or on a prefix; the time of drawing and moving; masks of dropout, which it turns off.
Mirrors github.com/princeton-nlp/MeZO, large_models/trainer.py: zo_step, zo_perturb_parameters and zo_update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.graph.core import Graph
from peftplan.graph.edit import train
from peftplan.methods._layers import refuse_packed
from peftplan.methods.base import Family, Host, Method, Remark, Trains

HARMLESS = frozenset({"zo_eps"})


@final
@dataclass(frozen=True)
class Mezo(Method):
    family: ClassVar[Family] = "memory-frugal"
    libraries: ClassVar[tuple[str, ...]] = ("MeZO",)
    trains: ClassVar[Trains] = "base"
    checkpoints: ClassVar[bool] = False
    backward: ClassVar[bool] = False
    forwards: ClassVar[int] = 2

    def apply(self, graph: Graph, host: Host) -> Graph:
        del host
        return refuse_packed(train(graph, lambda _, __: True), "mezo")

    def aside(self, gradient_bytes: int) -> tuple[int, ...]:
        """`grad * z + weight_decay * p`: the numbers, both products, and their sum."""
        return (gradient_bytes,) * 4

    def remarks(self, graph: Graph) -> tuple[Remark, ...]:
        del graph
        why = "MeZO moves the weights by itself, so the optimizer has no states and no step"
        return (
            Remark("optimizer", "none", why),
            Remark("time", "forward passes", "moving the weights is not timed; errs low"),
        )


METHOD = Mezo
EXAMPLES = (Mezo(),)
UNVERIFIED: dict[str, str] = {}
