"""Prompt tuning: trained embeddings in front of every sequence (Lester 2021, arXiv:2104.08691, section 2).

Trains: num_virtual_tokens x hidden.
Keeps for backward: nothing of its own; every activation of the model is that many positions longer, logits included.
Not modelled: packed batches, a token_dim other than the model's.
Mirrors peft/tuners/prompt_tuning/model.py PromptEmbedding and PeftModelForCausalLM.forward, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.builder import Builder
from peftplan.graph.core import Tensor
from peftplan.methods import _prompts, _virtual
from peftplan.methods._virtual import Prompt, VirtualTokens, repeated

HARMLESS = _virtual.HARMLESS | _virtual.TEXT


@final
@dataclass(frozen=True)
class PromptTuning(VirtualTokens):
    """PEFT's PromptTuningConfig, the knobs that change memory."""

    def encode(self, b: Builder, ids: Tensor, prompt: Prompt) -> Tensor:
        """PromptEmbedding.forward."""
        return repeated(b, _prompts.lookup(b, ids, prompt.tokens, prompt.hidden), prompt)


METHOD = PromptTuning
EXAMPLES = (PromptTuning(num_virtual_tokens=20),)
UNVERIFIED: dict[str, str] = {}
