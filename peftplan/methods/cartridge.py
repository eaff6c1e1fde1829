"""Cartridges: a prefix that is plain parameters, its first tokens frozen (Eyuboglu 2025, arXiv:2506.06266).

Trains: (num_virtual_tokens - num_frozen_tokens) x layers x 2 x (key-value heads x head_dim); the frozen tokens lie
beside them.
Keeps for backward: as prefix_tuning.
Not modelled: packed batches; layers whose keys differ in width. PEFT cannot run it with gradient checkpointing.
Mirrors peft/tuners/cartridge/model.py CartridgeEncoder, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Tensor
from peftplan.methods import _prompts
from peftplan.methods._prefixes import Cache, Prefix

HARMLESS = _prompts.HARMLESS


@final
@dataclass(frozen=True)
class Cartridge(Prefix):
    """PEFT's CartridgeConfig, the knobs that change memory."""

    num_frozen_tokens: int = 1

    def encode(self, b: Builder, ids: Tensor, cache: Cache) -> Tensor:
        """CartridgeEncoder.forward: frozen and trained tokens one after the other, expanded to the batch."""
        del ids
        frozen = self.num_frozen_tokens
        if not 0 <= frozen < cache.tokens:
            raise RequestError(
                f"method.num_frozen_tokens={frozen}: leave at least one of {cache.tokens} virtual tokens to train"
            )
        whole = Tensor("", (cache.tokens, cache.values), _prompts.FP32)
        trained = Tensor(
            "@prompt_encoder.trainable_embedding", (cache.tokens - frozen, cache.values), whole.dtype, ADAPTER, True
        )
        if frozen:  # the gradient is a part of the one that torch.cat gets, and keeps all of that alive
            kept = Tensor("@prompt_encoder.frozen_embedding", (frozen, cache.values), whole.dtype, ADAPTER)
            trained = b.formula("embedding", whole, kept, trained, grads=(Grad(trained, 0),), parts=True)
        return b.view(trained, cache.size, cache.tokens, cache.values, label="expanded", grad_copied=cache.size > 1)


METHOD = Cartridge
EXAMPLES = (Cartridge(num_virtual_tokens=20), Cartridge(num_virtual_tokens=5, num_frozen_tokens=0))
UNVERIFIED: dict[str, str] = {}
