"""UniPELT: a prefix, Pfeiffer adapters and LoRA at once, each behind a gate (Mao 2022, arXiv:2110.07577, section 3).

Trains: what `hub_prefix_tuning` with a prefix_length of 10, `seq_bn` and `hub_lora` train, and their gates: a sigmoid
of what enters, averaged over the tokens of a row, per layer for the prefix and the adapter and per LoRA.
Keeps for backward: what each of them keeps, and what its gate multiplies; LoRA's gate takes its scaling's place.
Not modelled: what any of them does not; another method in place of one of them.
Mirrors adapters/configuration/adapter_config.py UniPELTConfig, adapters 1.3.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

from peftplan.methods._adapterhub import AdapterHub
from peftplan.methods._hub_union import HubUnion
from peftplan.methods.hub_lora import HubLora
from peftplan.methods.hub_prefix_tuning import HubPrefixTuning
from peftplan.methods.seq_bn import SeqBn


@final
@dataclass(frozen=True)
class UniPelt(HubUnion):
    """adapters' UniPELTConfig: the settings of its parts, by name."""

    prefix_tuning: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    base_config: ClassVar[str] = "unipelt"
    parts: ClassVar[tuple[str, ...]] = ("prefix_tuning", "adapter", "lora")
    fixed: ClassVar[tuple[str, ...]] = ("use_gating",)

    def members(self) -> Iterator[AdapterHub]:
        yield self.part("prefix_tuning", HubPrefixTuning, prefix_length=10, use_gating=True)
        yield self.part("adapter", SeqBn, use_gating=True)
        yield self.part("lora", HubLora, use_gating=True)


METHOD = UniPelt
EXAMPLES = (UniPelt(), UniPelt(prefix_tuning={"flat": True}, adapter={"reduction_factor": 6}, lora={"r": 4}))
UNVERIFIED: dict[str, str] = {}
