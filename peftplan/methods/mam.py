"""Mix-and-match: a prefix in attention and a scaled bottleneck beside the feed-forward (He 2022, arXiv:2110.04366).

Trains: what `hub_prefix_tuning` with a bottleneck_size of 800 trains, and what `par_bn` trains.
Keeps for backward: what each of them keeps.
Not modelled: what either does not; another method in place of one of them.
Mirrors adapters/configuration/adapter_config.py MAMConfig, adapters 1.3.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

from peftplan.methods._adapterhub import AdapterHub
from peftplan.methods._hub_union import HubUnion
from peftplan.methods.hub_prefix_tuning import HubPrefixTuning
from peftplan.methods.par_bn import ParBn


@final
@dataclass(frozen=True)
class Mam(HubUnion):
    """adapters' MAMConfig: the settings of its parts, by name."""

    prefix_tuning: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    base_config: ClassVar[str] = "mam"
    parts: ClassVar[tuple[str, ...]] = ("prefix_tuning", "adapter")

    def members(self) -> Iterator[AdapterHub]:
        yield self.part("prefix_tuning", HubPrefixTuning, bottleneck_size=800)
        yield self.part("adapter", ParBn)


METHOD = Mam
EXAMPLES = (Mam(), Mam(prefix_tuning={"prefix_length": 8, "bottleneck_size": 24}, adapter={"reduction_factor": 6}))
UNVERIFIED: dict[str, str] = {}
