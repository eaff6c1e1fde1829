"""Parallel adapters: a bottleneck beside each feed-forward, scaled (He 2022, arXiv:2110.04366, section 4).

Trains: per layer a projection of what enters the sublayer down to hidden / reduction_factor and one back up, with
biases; a scale per layer where `scaling` is `learned`, or per channel.
Keeps for backward: what enters both projections, what the non-linearity's formula reads, and what a learned scale
multiplies.
Not modelled: new layer norms, hypercomplex layers, families without an interface in adapters.
Mirrors adapters/configuration/adapter_config.py ParBnConfig and adapters/methods/modeling.py ParallelAdapter,
adapters 1.3.0, which beside attention takes what enters the layer, before its norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from peftplan.methods._adapterhub import COMMON
from peftplan.methods._bottleneck import Bottleneck, Factor

HARMLESS = COMMON
VARIANTS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "scaled_par_bn": {"scaling": "learned"},
    "scaled_parallel": {"scaling": "learned"},
}


@final
@dataclass(frozen=True)
class ParBn(Bottleneck):
    """adapters' ParBnConfig."""

    reduction_factor: Factor = 2
    is_parallel: bool = True
    scaling: float | Literal["learned", "channel"] = 4.0
    base_config: ClassVar[str] = "par_bn"


METHOD = ParBn
EXAMPLES = (ParBn(), ParBn(mh_adapter=True, reduction_factor=6, dropout=0.1))
UNVERIFIED: dict[str, str] = {}
