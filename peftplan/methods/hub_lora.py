"""AdapterHub's LoRA: low-rank branches on queries, keys, values and the feed-forward (Hu 2021, arXiv:2106.09685).

Beside PEFT's `lora` its graph multiplies by A and B as plain matrices, which autocast casts anew at every use, scales
the branch a second time, by one, and holds what the layer itself gave until it returns; a gate may take the place of
the scaling. There is no place for it at `o_proj` and `gate_proj`.
Trains: per adapted layer r (in + out); with `use_gating` in + 1 more.
Keeps for backward: what enters the branch, after dropout, the r values between A and B, both of them; with a gate the
branch besides.
Not modelled: DoRA, VeRA and MTL-LoRA (`use_dora`, `vera_d`, `n_up_projection`), a `dtype` of its own, families without
an interface in adapters.
Mirrors adapters/methods/lora.py LoRA.forward, adapters 1.3.0: of Llama and Mistral `intermediate_lora` is `down_proj`
and `output_lora` is `up_proj`, of Qwen the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Tensor
from peftplan.graph.edit import Module
from peftplan.methods._adapterhub import COMMON
from peftplan.methods._branches import check_rank, check_share
from peftplan.methods._hub_linears import HubLinears
from peftplan.methods.base import Family, Host
from peftplan.units import DType

HARMLESS = COMMON | {"alpha"}


@final
@dataclass(frozen=True)
class HubLora(HubLinears):
    """adapters' LoRAConfig."""

    r: int = 8
    dropout: float = 0.0
    family: ClassVar[Family] = "reparameterized"
    base_config: ClassVar[str] = "lora"

    def check(self, host: Host) -> None:
        super().check(host)
        check_rank(self.r)
        check_share("dropout", self.dropout)

    def change(self, b: Builder, module: Module, dtype: DType) -> Tensor:
        """dropout(x) @ A.t() @ B.t()."""
        x = module.x
        with b.marked(module.site, "down"):
            given = b.dropout(x, self.dropout)
            down = self._times(b, given, "lora_A", module.in_features, self.r, dtype)
        with b.marked(module.site, "up"):
            return self._times(b, down, "lora_B", self.r, module.out_features, dtype)

    @staticmethod
    def _times(b: Builder, x: Tensor, label: str, wide: int, out: int, dtype: DType) -> Tensor:
        weight = b.view(b.alias(b.weight(label, out, wide, dtype=dtype, kind=ADAPTER)), label=f"{label}_t")
        return b.linear(x, weight, label=f"times_{label}")

    def composed(self, b: Builder, base: Tensor, change: Tensor) -> Tensor:
        """LoRA.com."""
        return b.add(base, change, label="sum")


METHOD = HubLora
EXAMPLES = (
    HubLora(),
    HubLora(r=4, attn_matrices=("q", "k", "v"), intermediate_lora=True, output_lora=True, dropout=0.1),
)
UNVERIFIED: dict[str, str] = {}
