"""PEFT's methods that are not modelled, and why; each goes when its file comes.

As of peft 0.21.2 (peft/utils/peft_types.py, PeftType); tests/test_completeness.py holds the list against PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping

_BY_VALUE = "it picks elements by their values, so no trace without values holds an estimate of it"
UNMODELLED: Mapping[str, str] = {
    "adalora": "its penalty adds products of every layer's adapters to the loss, which a step's graph cannot say yet",
    "adamss": "its subspaces of each weight's decomposition are not written down yet",
    "adaption_prompt": "it replaces the attention of the last layers, not a projection",
    "cartridge": "a prefix of which a part is frozen is not written down yet; prefix_tuning is the nearest",
    "cpt": f"it computes a loss of its own; {_BY_VALUE}",
    "osf": "it projects its gradients in hooks during the backward, which a step's graph cannot say yet",
    "poly": "its mixing weights are drawn per task, a chain of small operators not written down yet",
    "psoft": "the rotation inside its low-rank product is not written down yet",
    "shadow": "a second hidden state, from a network and to a loss of its own, goes through the layers with the first",
    "shira": "its change is a sparse tensor, whose storage no trace sees, so nothing holds an estimate of it",
    "waveft": f"before its wavelet transform {_BY_VALUE}",
    "xlora": "it runs the whole model twice, over adapters that were trained before",
}
"""Lower-case PeftType -> why."""
