"""PEFT's methods that are not modelled, and why; each goes when its file comes.

As of peft 0.21.2 (peft/utils/peft_types.py, PeftType); tests/test_completeness.py holds the list against PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping

UNMODELLED: Mapping[str, str] = {
    "shadow": "a second hidden state, from a network and to a loss of its own, goes through the layers with the first",
}
"""Lower-case PeftType -> why."""
OF_PAPERS: Mapping[str, str] = {
    "lst": "ladder side-tuning (Sung 2022, arXiv:2206.06522) runs a narrow network beside the model, and from layer to "
    "layer this graph hands on one hidden state, not two; nothing here is near it",
    "s4": "the spindle of four groups of layers (Chen 2023, arXiv:2301.01821) gives each group its own mix of adapters,"
    " prefixes, LoRA and biases, and methods here are not mixed; price its parts one by one",
}
"""Methods that only papers have, and why they are not modelled."""
NO_METHOD: Mapping[str, str] = {
    "neftune": "it is noise on the embedding's output of any method (Jain 2023, arXiv:2310.05914), which trains nothing"
    " and keeps nothing for backward: one more tensor of batch x sequence x hidden, and its sum with the embeddings, "
    "when the forward begins; price the method without it",
}
"""What goes by a name like a method's and is none -> what it is, and what to do."""
