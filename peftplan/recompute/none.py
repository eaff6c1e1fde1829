"""Nothing is recomputed: everything that backward needs is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Region
from peftplan.recompute.base import Checkpoint, Recompute


@final
@dataclass(frozen=True)
class Nothing(Recompute):
    layers = False

    def checkpoint(self, region: Region, index: int, depth: int) -> Checkpoint | None:
        del region, index, depth
        return None

    def refusal(self) -> str | None:
        return (
            "--offload activations without recomputation is not modelled yet; add --recompute full"
            if self.offload
            else None
        )


RECOMPUTE = Nothing
EXAMPLES = (Nothing(),)
UNVERIFIED: tuple[str, ...] = ()
