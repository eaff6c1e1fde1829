"""PEFT's methods that are not modelled, and why; each goes when its file comes.

As of peft 0.21.2 (peft/utils/peft_types.py, PeftType); tests/test_completeness.py holds the list against PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping

_BY_VALUE = "it picks elements by their values, so no trace without values holds an estimate of it"
UNMODELLED: Mapping[str, str] = {
    "shadow": "it trains a second model beside the first, with a loss of its own",
}
"""Lower-case PeftType -> why."""
NO_METHOD: Mapping[str, str] = {
    "neftune": "it is noise on the embedding's output of any method (Jain 2023, arXiv:2310.05914), which trains nothing"
    " and keeps nothing for backward: one more tensor of batch x sequence x hidden, and its sum with the embeddings, "
    "when the forward begins; price the method without it",
}
"""What goes by a name like a method's and is none -> what it is, and what to do."""
