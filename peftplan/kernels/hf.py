"""transformers' own modelling code (5.23), op by op: what runs where nothing else is asked for.

Trains: anything.
Keeps for backward: what torch's formulas of the single operators keep.
Not modelled: `use_kernels=True`, which loads compiled kernels from the Hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftplan.graph.blocks.kernels import Kernels


@dataclass(frozen=True, kw_only=True)
class Transformers(Kernels):
    """Everything as `graph/blocks/kernels.py` states it."""

    replaces: ClassVar[bool] = False


KERNELS = Transformers
EXAMPLES = (Transformers(),)
UNVERIFIED: dict[str, str] = {}
