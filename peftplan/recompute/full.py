"""Every layer is checkpointed: its input stays, its forward runs again in backward (Chen 2016, arXiv:1604.06174).

transformers' `activation_checkpointing_enable()`, which also makes the embeddings' output require a gradient. The
non-reentrant flavour stops the second run once the last saved tensor is there; CheckpointFunction runs all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Region
from peftplan.recompute.base import Checkpoint, Recompute


@final
@dataclass(frozen=True)
class Full(Recompute):
    def checkpoint(self, region: Region, index: int, depth: int) -> Checkpoint | None:
        del region, index, depth
        return self.whole()


RECOMPUTE = Full
EXAMPLES = (Full(), Full(use_reentrant=True))
UNVERIFIED: tuple[str, ...] = ()
