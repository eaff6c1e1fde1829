"""LongLoRA: LoRA, with embedding and norms trained besides, and attention within shifted parts of a row (Chen 2023,
arXiv:2309.12307, section 3).

Trains: as LoRA; and every weight of the base whose name has one of `trainable_params` in it.
Keeps for backward: as LoRA; queries, keys and values of every head as they are rolled, in place of the projections'
own; what norms and the embedding keep where they train.
Not modelled: eager attention, packed rows, layers with windows.
Mirrors LLaMA-Factory, model/model_utils/longlora.py (transformers below 4.48), put into transformers 5.23's attention,
and dvlab-research/LongLoRA, fine-tune.py, for what trains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.blocks.setup import Batch
from peftplan.graph.core import ADAPTER, Graph, Region, Tensor
from peftplan.graph.edit import train
from peftplan.methods import lora
from peftplan.methods._layers import refuse_packed
from peftplan.methods._lora_knobs import LoraKnobs
from peftplan.methods.base import Host
from peftplan.methods.targets import Names

HARMLESS = lora.HARMLESS


@final
@dataclass(frozen=True)
class Longlora(LoraKnobs):
    group_size_ratio: float = 0.25
    trainable_params: tuple[str, ...] = ("embed", "norm")
    libraries: ClassVar[tuple[str, ...]] = ("LongLoRA", "LLaMA-Factory")

    def default_targets(self, family: str) -> Names:
        """fine-tune.py: targets."""
        return ("qkv_proj", "o_proj") if family == "phi3" else ("q_proj", "k_proj", "v_proj", "o_proj")

    def seen(self, batch: Batch) -> Batch:
        if not 0 < self.group_size_ratio <= 1:
            raise RequestError(f"method.group_size_ratio={self.group_size_ratio}: must be above 0 and at most 1")
        part = int(batch.seq * self.group_size_ratio)
        if not part or batch.seq % part:
            raise RequestError(f"--seq-len {batch.seq} does not split into parts of {part} tokens "
                               f"(method.group_size_ratio={self.group_size_ratio}); use a multiple of it")  # fmt: skip
        return replace(batch, groups=batch.seq // part)

    def apply(self, graph: Graph, host: Host) -> Graph:
        wanted = self.default_targets(host.arch.family) if self.target_modules is None else self.target_modules
        adapted = replace(self.plain(), target_modules=wanted).apply(graph, host)
        return refuse_packed(train(adapted, self._trains), "longlora")

    def _trains(self, region: Region, weight: Tensor) -> bool:
        del region
        return weight.trainable or (weight.kind != ADAPTER and any(n in weight.name for n in self.trainable_params))


METHOD = Longlora
EXAMPLES = (Longlora(group_size_ratio=1.0), Longlora(r=3, group_size_ratio=1.0, trainable_params=("norm",)))
UNVERIFIED: dict[str, str] = {"parts shorter than a row": "the zoo's rows of 17 tokens do not split; see its own tests"}
