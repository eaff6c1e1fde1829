"""Lion (Chen 2023, arXiv:2302.06675) as bitsandbytes 0.50.2 runs it: one state, in fp32 or in 8 bits.

bitsandbytes/optim/lion.py and optimizer.py, Optimizer1State.init_state: an fp32 state whatever the weight's dtype, or
uint8 with an fp32 absmax per 256 elements; weights below 4,096 elements keep an fp32 state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from peftplan.optimizers._blockwise import Blockwise

VARIANTS: dict[str, dict[str, Any]] = {
    "lion_32bit": {},
    "lion_8bit": {"optim_bits": 8},
    "paged_lion_32bit": {"is_paged": True},
    "paged_lion_8bit": {"is_paged": True, "optim_bits": 8},
}


@final
@dataclass(frozen=True)
class Lion(Blockwise):
    parts: ClassVar[tuple[int, ...]] = (1,)

    optim_bits: Literal[8, 32] = 32


OPTIMIZER = Lion
EXAMPLES = (Lion(), Lion(optim_bits=8), Lion(is_paged=True), Lion(is_paged=True, optim_bits=8))
UNVERIFIED: dict[str, str] = {}
