"""ReLoRA: LoRA that is merged into the weights and started again every so many steps (Lialin 2023, arXiv:2307.05695,
algorithm 1).

Trains: as LoRA.
Keeps for backward: as LoRA.
Merges between two steps, one linear layer after another: the product of its factors and that product scaled, beside
the one before it, which its name still holds. A packed base is packed anew from a full weight: the product, the
weight as the file has it, their sum, and the sum before it; with `cpu_offload` the sum alone comes back.
Not modelled: the first phase of full training; the pruning of states, which takes less than a merge.
Mirrors axolotl 0.19.0, monkeypatch/relora.py, merge_and_save and update_weights, and peft/tuners/lora/layer.py,
get_delta_weight, peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.core import Graph, Tensor
from peftplan.methods import lora
from peftplan.methods._lora_knobs import LoraKnobs
from peftplan.methods.base import Host

HARMLESS = lora.HARMLESS | {"prune_ratio", "prune_method", "restart_steps"}
FILE_BYTES = 2
"""Of a number in a checkpoint that is merged into: half precision (merge_and_save writes `.half()`)."""


@final
@dataclass(frozen=True)
class Relora(LoraKnobs):
    """LoraConfig's settings and Axolotl's own."""

    cpu_offload: bool = False
    """Whether the merge of a packed base is computed on the CPU."""
    libraries: ClassVar[tuple[str, ...]] = ("Axolotl",)

    def apply(self, graph: Graph, host: Host) -> Graph:
        if self.modules_to_save:
            raise RequestError("method.modules_to_save: ReLoRA merges adapters only; leave it out")
        return self.plain().apply(graph, host)

    def between(self, graph: Graph) -> tuple[int, ...]:
        found = list(_products(graph))
        packed = any(t.stored_bytes is not None for t, _ in graph.params())
        if packed and self.cpu_offload:
            return (max(size.nbytes for size in found),)
        steps = (self._packed(one, before) if packed else (before.nbytes, one.nbytes, one.nbytes)
                 for before, one in pairwise([found[-1], *found]))  # fmt: skip
        return max(steps, key=sum)

    @staticmethod
    def _packed(one: Tensor, before: Tensor) -> tuple[int, ...]:
        return before.nbytes, one.nbytes, one.numel * FILE_BYTES, one.nbytes


def _products(graph: Graph) -> Iterator[Tensor]:
    """B A of every adapted layer, in the order they are used."""
    for region in graph.regions:
        factors = {t.name: t for t in region.params()}
        for name, b in factors.items():
            if name.endswith(".lora_B.weight"):
                a = factors[name.replace(".lora_B.", ".lora_A.")]
                yield b._replace(shape=(b.shape[0], a.shape[1]))


METHOD = Relora
EXAMPLES = (Relora(), Relora(r=3, target_modules="all-linear", lora_dropout=0.1))
UNVERIFIED: dict[str, str] = {}
