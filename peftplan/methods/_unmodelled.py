"""PEFT's methods that are not modelled, and why; each goes when its file comes.

As of peft 0.21.2 (peft/utils/peft_types.py, PeftType); tests/test_completeness.py holds the list against PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping

_NO_VALUES = "the real model cannot be traced without values, so nothing holds an estimate of it"
UNMODELLED: Mapping[str, str] = {
    "adalora": "its penalty adds products of every layer's adapters to the loss, which a step's graph cannot say yet",
    "adamss": "it clusters the rows of each weight's decomposition, so its shapes depend on the weights' values",
    "adaption_prompt": "it replaces the attention of the last layers, not a projection",
    "cartridge": "its prefix is trained as it is, without an encoder; a frozen part of it is not told apart yet",
    "cpt": f"it computes a second loss, and its prompt's length depends on masks; {_NO_VALUES}",
    "frod": "its sparse factors are decomposed from the weights' values and held on the CPU",
    "osf": f"it decomposes every weight when it is made, and projects gradients in hooks; {_NO_VALUES}",
    "poly": "its mixing weights are drawn per task from distributions, a chain of small operators not written down yet",
    "psoft": "it decomposes every weight when it is made",
    "shadow": "it trains a second model beside the first, with a loss of its own",
    "shira": f"its mask is drawn over the weights' values; {_NO_VALUES}",
    "tinylora": "its shared vectors belong to groups of modules across layers",
    "waveft": f"its inverse wavelet transform picks elements by value; {_NO_VALUES}",
    "xlora": "it runs the whole model twice, over adapters that were trained before",
}
"""Lower-case PeftType -> why."""
