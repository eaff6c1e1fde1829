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
from peftplan.graph.core import ADAPTER, Tensor
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

        def part(name: str, tokens: int, *, trains: bool) -> Tensor:
            return Tensor(f"@prompt_encoder.{name}", (tokens, cache.values), _prompts.FP32, ADAPTER, trains)

        weight = part("trainable_embedding", cache.tokens - frozen, trains=True)
        if frozen:
            kept = part("frozen_embedding", frozen, trains=False)
            weight = b.concat((kept, weight), cache.tokens, cache.values, label="embedding")
        return b.view(weight, cache.size, cache.tokens, cache.values, label="expanded", grad_copied=cache.size > 1)


METHOD = Cartridge
EXAMPLES = (Cartridge(num_virtual_tokens=20), Cartridge(num_virtual_tokens=5, num_frozen_tokens=0))
UNVERIFIED: dict[str, str] = {}
