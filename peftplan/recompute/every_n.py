"""Every n-th layer is checkpointed, the first of all; the others keep what backward needs.

transformers 5.23's `every_n_layers` (modeling_utils.py, _set_gradient_checkpointing: layer_index % every_n_layers).
torchtitan's former `selective` with a number checkpoints the last of every n layers instead: as many, of the same size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Region
from peftplan.recompute.base import Checkpoint, Recompute


@final
@dataclass(frozen=True)
class EveryN(Recompute):
    uniform = False

    every_n: int = 2
    """One layer of so many."""

    def checkpoint(self, region: Region, index: int, depth: int) -> Checkpoint | None:
        del region, depth
        return None if index % self.every_n else self.whole()

    def alike(self, index: int, depth: int, most: int) -> int:
        """A checkpointed layer stands alone; the others are a run up to the next one."""
        del depth
        if self.every_n == 1:
            return most
        after = index % self.every_n
        return min(most, self.every_n - after if after else 1)

    def refusal(self) -> str | None:
        return None if self.every_n > 0 else f"recompute.every_n={self.every_n}: give 1 or more"


RECOMPUTE = EveryN
EXAMPLES = (EveryN(), EveryN(every_n=3), EveryN(use_reentrant=True))
UNVERIFIED: tuple[str, ...] = ()
