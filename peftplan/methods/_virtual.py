"""Methods that put trained embeddings in front of every sequence: the knobs they share, and how they are put on.

Mirrors peft/config.py PromptLearningConfig and peft/peft_model.py PeftModelForCausalLM.forward, peft 0.21.2.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from peftplan.errors import Unsupported
from peftplan.graph.blocks.setup import Batch
from peftplan.graph.builder import Builder
from peftplan.graph.core import Graph, Tensor
from peftplan.methods import _prompts
from peftplan.methods._saved import save_modules
from peftplan.methods.base import Family, Host, Method

HARMLESS = _prompts.HARMLESS | {"num_attention_heads", "num_layers"}
TEXT = frozenset({"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"})
"""Where the first values come from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """The shape of what is put in front: (size, tokens, hidden)."""

    size: int
    tokens: int
    hidden: int


@dataclass(frozen=True)
class VirtualTokens(Method):
    """The knobs that every such PEFT config has."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    modules_to_save: tuple[str, ...] | None = None
    family: ClassVar[Family] = "soft prompt"

    @abstractmethod
    def encode(self, b: Builder, ids: Tensor, prompt: Prompt) -> Tensor:
        """The prompt encoder's forward: (size, tokens, hidden)."""

    def check(self) -> None:
        """Raises RequestError for knobs that do not go together."""

    def inputs(self, size: int) -> tuple[Tensor, ...]:
        """What the batch must bring besides."""
        del size
        return ()

    def seen(self, batch: Batch) -> Batch:
        return _prompts.longer(batch, self.num_virtual_tokens)

    def apply(self, graph: Graph, host: Host) -> Graph:
        hidden = host.arch.hidden
        tokens = _prompts.checked_tokens(self.num_virtual_tokens)
        self.check()
        check_saved(self.modules_to_save)
        _prompts.check_shape(
            token_dim=(self.token_dim, hidden), num_transformer_submodules=(self.num_transformer_submodules, 1)
        )
        prompt = Prompt(size=graph.regions[0].exit.shape[0], tokens=tokens, hidden=hidden)
        longer = _prompts.prepend(graph, host, tokens, lambda b, ids: self.encode(b, ids, prompt))
        longer = replace(longer, inputs=(*longer.inputs, *self.inputs(prompt.size)))
        return save_modules(longer, self.modules_to_save)


def check_saved(wanted: tuple[str, ...] | None) -> None:
    """Raises Unsupported for a copy that PEFT would not train."""
    if any("model.embed_tokens".endswith(name) for name in wanted or ()):
        raise Unsupported(
            "method.modules_to_save: PEFT puts virtual tokens beside the original embedding's, so a copy of "
            "embed_tokens would never train; leave it out"
        )


def repeated(b: Builder, prompts: Tensor, prompt: Prompt) -> Tensor:
    """`prompts.repeat(batch_size, 1, 1)`."""
    shape = (prompt.size, prompt.tokens, prompt.hidden)
    return b.copy(prompts, *shape, label="prompts", grad_copied=prompt.size > 1)
