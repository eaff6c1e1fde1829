"""Prompt tuning: trained embeddings in front of every sequence (Lester 2021, arXiv:2104.08691, section 2).

Trains: num_virtual_tokens x hidden.
Keeps for backward: nothing of its own; every activation of the model is that many positions longer, logits included.
Not modelled: packed batches, a token_dim other than the model's.
Mirrors peft/tuners/prompt_tuning/model.py PromptEmbedding and PeftModelForCausalLM.forward, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.graph.blocks.decoder import Batch
from peftplan.graph.builder import Builder
from peftplan.graph.core import Graph, Tensor
from peftplan.methods import _prompts
from peftplan.methods.base import Family, Host, Method

HARMLESS = _prompts.HARMLESS | {
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "num_attention_heads", "num_layers",
}  # fmt: skip


@final
@dataclass(frozen=True)
class PromptTuning(Method):
    """PEFT's PromptTuningConfig, the knobs that change memory."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    family: ClassVar[Family] = "soft prompt"

    def seen(self, batch: Batch) -> Batch:
        return _prompts.longer(batch, self.num_virtual_tokens)

    def apply(self, graph: Graph, host: Host) -> Graph:
        tokens, hidden = _prompts.checked_tokens(self.num_virtual_tokens), host.arch.hidden
        _prompts.check_shape(
            token_dim=(self.token_dim, hidden), num_transformer_submodules=(self.num_transformer_submodules, 1)
        )

        def encode(b: Builder, ids: Tensor) -> Tensor:
            return _prompts.repeated(b, _prompts.lookup(b, ids, tokens, hidden), graph)

        return _prompts.prepend(graph, host, tokens, encode)


METHOD = PromptTuning
EXAMPLES = (PromptTuning(num_virtual_tokens=20),)
UNVERIFIED: dict[str, str] = {}
