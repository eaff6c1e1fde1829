"""AdapterHub's prefix tuning: trained keys and values before every layer's own (Li 2021, arXiv:2101.00190).

Beside PEFT's `prefix_tuning` its network is narrow (`bottleneck_size`) over an embedding as wide as the model, runs
for every row of the batch, and its prefixes are no cache: the causal mask does not count them, every layer writes
itself a longer one where there is one, and gradient checkpointing works.
Trains: prefix_length x layers x 2 x (key-value heads x head_dim) where `flat`; else prefix_length x hidden and two
layers, hidden to bottleneck_size to those values of one token, with biases.
Keeps for backward: keys and values longer by the prefix; what enters the two layers; in attention the longer mask.
With gates what they multiply besides.
Not modelled: packed batches, `leave_out`, flat prefixes in half precision under autocast, families without prefixes in
adapters.
Mirrors adapters/methods/prefix_tuning.py PrefixTuning, FlatPrefixTuning and PrefixTuningLayer, adapters 1.3.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from peftplan.methods._adapterhub import COMMON
from peftplan.methods._hub_prefix import Prefixes

HARMLESS = COMMON | {"encoder_prefix", "cross_prefix"}
VARIANTS: dict[str, dict[str, Any]] = {"hub_prefix_tuning_flat": {"flat": True}}


@final
@dataclass(frozen=True)
class HubPrefixTuning(Prefixes):
    """adapters' PrefixTuningConfig."""


METHOD = HubPrefixTuning
EXAMPLES = (HubPrefixTuning(), HubPrefixTuning(flat=True, prefix_length=7))
UNVERIFIED: dict[str, str] = {}
