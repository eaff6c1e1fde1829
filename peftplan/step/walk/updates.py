"""Weights that are updated while backward runs, so that their gradients die there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftplan.graph.core import Region, Tensor, is_global


@dataclass(frozen=True, kw_only=True, slots=True)
class InBackward:
    """What is done with a weight's gradient: `scratch_bytes` are the temporaries of the update after which it goes,
    None where it stays. `late`: that happens when the next gradient arrives, and after backward for the last."""

    scratch_bytes: Callable[[Tensor, Region], int | None]
    late: bool = False


@dataclass(slots=True)
class Waiting:
    """The gradient that the next one will replace, of whichever region; one for a whole backward."""

    bytes: int = 0
    scratch_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Updates:
    """The policy as it works on one region. `shared`: weights that other regions, or all its layers, have too; they
    are updated when backward is done."""

    policy: InBackward
    waiting: Waiting
    shared: frozenset[str]

    def alone(self, weight: Tensor) -> bool:
        return weight.name not in self.shared


def shared_weights(regions: Sequence[Region]) -> frozenset[str]:
    """Names of weights that are used in several regions or in all layers of one."""
    uses: Counter[str] = Counter()
    for region in regions:
        uses.update({t.name: region.count for t in region.params() if is_global(t.name)})
    return frozenset(name for name, count in uses.items() if count > 1)
