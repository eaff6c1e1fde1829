"""AdapterDrop: Pfeiffer adapters in the upper layers alone (Rücklé 2021, arXiv:2010.11918, section 3).

Trains: per layer that is not in `leave_out` a projection down to hidden / reduction_factor and one back up, with
biases.
Keeps for backward: as Pfeiffer adapters; nothing below the first layer that has one, where no gradient is needed.
Not modelled: robust AdapterDrop, which drops another number of layers each batch: its dearest batch drops none
(`seq_bn`); new layer norms, families without an interface in adapters.
Mirrors adapters/configuration/adapter_config.py BnConfig.leave_out, adapters 1.3.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.methods._adapterhub import COMMON
from peftplan.methods._bottleneck import Bottleneck

HARMLESS = COMMON


@final
@dataclass(frozen=True)
class AdapterDrop(Bottleneck):
    """adapters' SeqBnConfig with `leave_out`: the paper's five lowest layers unless it says others."""

    leave_out: tuple[int, ...] = (0, 1, 2, 3, 4)
    original_ln_before: bool = True
    base_config: ClassVar[str] = "seq_bn"


METHOD = AdapterDrop
EXAMPLES = (AdapterDrop(leave_out=(0, 1)), AdapterDrop(leave_out=(0,), mh_adapter=True))
UNVERIFIED: dict[str, str] = {}
