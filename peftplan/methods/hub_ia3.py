"""AdapterHub's IA3: keys, values and a projection of the feed-forward times vectors (Liu 2022, arXiv:2205.05638).

Beside PEFT's `ia3` its vectors scale what every layer gives, none what one is given, are repeated for every row of the
batch, and are scaled twice more.
Trains: per adapted layer `out`; with `use_gating` in + 1 more.
Keeps for backward: the layer's output, and the vector for every row.
Not modelled: autocast over fp32 vectors, which would make what they scale fp32; families without an interface in
adapters.
Mirrors adapters/methods/lora.py IA3.forward, adapters 1.3.0: of Llama and Mistral `intermediate_lora` is `down_proj`
and `output_lora` is `up_proj`, of Qwen the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Tensor
from peftplan.graph.edit import Module
from peftplan.methods._adapterhub import COMMON
from peftplan.methods._hub_linears import HubLinears
from peftplan.units import DType

HARMLESS = COMMON | {"alpha"}


@final
@dataclass(frozen=True)
class HubIa3(HubLinears):
    """adapters' IA3Config."""

    intermediate_lora: bool = True
    attn_matrices: tuple[str, ...] = ("k", "v")
    base_config: ClassVar[str] = "ia3"

    def change(self, b: Builder, module: Module, dtype: DType) -> Tensor:
        """The vector, for every row of the batch."""
        with b.marked(module.site, "scale"):
            vector = b.weight("lora_B", module.out_features, 1, dtype=dtype, kind=ADAPTER)
            shape = (module.x.shape[0], 1, module.out_features)
            return b.copy(vector, *shape, label="repeated", grad_copied=True)

    def composed(self, b: Builder, base: Tensor, change: Tensor) -> Tensor:
        """IA3.com."""
        return b.mul(base, change, label="scaled")


METHOD = HubIa3
EXAMPLES = (HubIa3(), HubIa3(attn_matrices=("q", "k", "v"), output_lora=True, use_gating=True))
UNVERIFIED: dict[str, str] = {}
