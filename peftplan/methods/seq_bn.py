"""Pfeiffer adapters: one bottleneck after each feed-forward (Pfeiffer 2021, arXiv:2005.00247, section 3).

Trains: per layer a projection of the hidden states down to hidden / reduction_factor and one back up, with biases;
with `inv_adapter` two small networks besides, which change the embeddings.
Keeps for backward: what enters both projections, and what the non-linearity's formula reads; of the frozen layers what
a gradient needs to pass through, as every adapter does.
Not modelled: new layer norms, GLOW's invertible adapters, hypercomplex layers (`compacter`), families without
an interface in adapters.
Mirrors adapters/configuration/adapter_config.py SeqBnConfig, adapters 1.3.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from peftplan.methods._adapterhub import COMMON
from peftplan.methods._bottleneck import Bottleneck

HARMLESS = COMMON
_INVERTIBLE: dict[str, Any] = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
VARIANTS: dict[str, dict[str, Any]] = {"pfeiffer": {}, "seq_bn_inv": _INVERTIBLE, "pfeiffer+inv": _INVERTIBLE}


@final
@dataclass(frozen=True)
class SeqBn(Bottleneck):
    """adapters' SeqBnConfig."""

    original_ln_before: bool = True
    base_config: ClassVar[str] = "seq_bn"


METHOD = SeqBn
EXAMPLES = (SeqBn(), SeqBn(reduction_factor=8, mh_adapter=True, non_linearity="gelu", leave_out=(0,)))
UNVERIFIED: dict[str, str] = {}
