"""LLaMA-Pro: copies of some layers are put behind them, and only these train (Wu 2024, arXiv:2401.02415, section 3.2).

Trains: every weight of the new layers; modules outside of the layers that are named in `train`.
Keeps for backward: as full fine-tuning, in the new layers; the layers between them keep what passes gradients on,
those below the first one nothing.
Not modelled: LoRA on the new layers.
Mirrors ms-swift 4.6.0, tuners/llamapro.py, which expands the model itself: one copy behind each group of layers,
whatever `num_new_blocks` says beside `num_groups`. LLaMA-Factory (model/adapter.py, _setup_freeze_tuning) trains a
model that was expanded before: `expand=false`, and every layer that ends a group is a new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.core import Graph
from peftplan.graph.edit import insert_layers
from peftplan.methods._layers import check_layers, outside, train_layers
from peftplan.methods.base import Family, Host, Method, Trains

HARMLESS = frozenset({"model_type"})


@final
@dataclass(frozen=True)
class LlamaPro(Method):
    family: ClassVar[Family] = "additive"
    libraries: ClassVar[tuple[str, ...]] = ("ms-swift", "LLaMA-Factory")
    trains: ClassVar[Trains] = "base"

    num_new_blocks: int = 8
    """ms-swift's llamapro_num_new_blocks, LLaMA-Factory's freeze_trainable_layers."""
    num_groups: int | None = None
    expand: bool = True
    train: tuple[str, ...] = ()
    """Modules outside the layers that train too: model.norm, lm_head, model.embed_tokens."""

    def apply(self, graph: Graph, host: Host) -> Graph:
        total = host.arch.num_layers
        stride = self._stride(total)
        if self.expand:
            graph, new = insert_layers(graph, lambda i: (i + 1) % stride == 0)
        else:
            new = frozenset(range(stride - 1, total, stride))
        return train_layers(graph, lambda i: i in new, outside(self.train, host.arch), method="llama_pro")

    def _stride(self, total: int) -> int:
        """How many layers a group has."""
        check_layers("num_new_blocks", self.num_new_blocks, total)
        if total % self.num_new_blocks:
            said = f"method.num_new_blocks={self.num_new_blocks}"
            raise RequestError(f"{said} does not divide the model's {total} layers; use one that does")
        if self.num_groups is None:
            return total // self.num_new_blocks
        if not self.expand:
            raise RequestError(
                "method.num_groups says how the model is expanded; leave it out with method.expand=false"
            )
        check_layers("num_groups", self.num_groups, total)
        return total // self.num_groups


METHOD = LlamaPro
EXAMPLES = (LlamaPro(num_new_blocks=3), LlamaPro(num_new_blocks=1, expand=False, train=("model.norm",)))
UNVERIFIED: dict[str, str] = {}
