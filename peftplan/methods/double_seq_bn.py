"""Houlsby adapters: one bottleneck after attention and one after the feed-forward (Houlsby 2019, arXiv:1902.00751).

Trains: twice per layer a projection of the hidden states down to hidden / reduction_factor and one back up, with
biases.
Keeps for backward: what enters both projections, and what the non-linearity's formula reads; of the frozen layers what
a gradient needs to pass through.
Not modelled: new layer norms, hypercomplex layers (`compacter`), families without an interface in adapters.
Mirrors adapters/configuration/adapter_config.py DoubleSeqBnConfig, adapters 1.3.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from peftplan.methods._adapterhub import COMMON
from peftplan.methods._bottleneck import Bottleneck

HARMLESS = COMMON
_INVERTIBLE: dict[str, Any] = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "houlsby": {}, "double_seq_bn_inv": _INVERTIBLE, "houlsby+inv": _INVERTIBLE,
}  # fmt: skip


@final
@dataclass(frozen=True)
class DoubleSeqBn(Bottleneck):
    """adapters' DoubleSeqBnConfig."""

    mh_adapter: bool = True
    non_linearity: str = "swish"
    base_config: ClassVar[str] = "double_seq_bn"


METHOD = DoubleSeqBn
EXAMPLES = (DoubleSeqBn(), DoubleSeqBn(reduction_factor=5, dropout=0.1, residual_before_ln=False))
UNVERIFIED: dict[str, str] = {}
