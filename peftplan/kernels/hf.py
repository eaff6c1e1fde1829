"""transformers' own modelling code (5.23), op by op: `graph/blocks/kernels.py` states it.

Trains: anything.
Keeps for backward: what torch's formulas of the single operators keep.
Not modelled: `use_kernels=True`, which loads compiled kernels from the Hub.
"""

from __future__ import annotations

from peftplan.graph.blocks.kernels import TRANSFORMERS, Kernels

KERNELS = Kernels
EXAMPLES = (TRANSFORMERS,)
UNVERIFIED: tuple[str, ...] = ()
