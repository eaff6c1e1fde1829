"""Prefix tuning: trained keys and values in front of every layer's own (Li 2021, arXiv:2101.00190, section 4).

Trains: num_virtual_tokens x layers x 2 x (key-value heads x head_dim); with prefix_projection an embedding of the
key-value width and a two-layer network instead.
Keeps for backward: keys and values longer by the virtual tokens, with every query head's copy of them where heads
share; a mask, which attention then needs, and which rules out its fastest kernel.
Not modelled: packed batches; layers whose keys differ in width. PEFT cannot run it with gradient checkpointing.
Mirrors peft/tuners/prefix_tuning/model.py PrefixEncoder, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.builder import Builder
from peftplan.graph.core import Tensor
from peftplan.methods import _prompts
from peftplan.methods._prefixes import Cache, Prefix

HARMLESS = _prompts.HARMLESS | {"init_weights"}


@final
@dataclass(frozen=True)
class PrefixTuning(Prefix):
    """PEFT's PrefixTuningConfig, the knobs that change memory."""

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None

    def encode(self, b: Builder, ids: Tensor, cache: Cache) -> Tensor:
        """PrefixEncoder.forward."""
        if not self.prefix_projection:
            return _prompts.lookup(b, ids, cache.tokens, cache.values, copies=cache.size)
        inner = self.encoder_hidden_size or cache.width
        x = _prompts.lookup(b, ids, cache.tokens, cache.width, copies=cache.size)
        h = b.squash(_prompts.linear(b, x, inner, "transform.0"), label="tanh")
        return _prompts.linear(b, h, cache.values, "transform.2")


METHOD = PrefixTuning
EXAMPLES = (PrefixTuning(num_virtual_tokens=20), PrefixTuning(num_virtual_tokens=5, prefix_projection=True))
UNVERIFIED: dict[str, str] = {}
