"""RMSprop as bitsandbytes 0.50.2 runs it: one state, in fp32 or in 8 bits.

bitsandbytes/optim/rmsprop.py and optimizer.py, Optimizer1State.init_state: as Lion's state is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from peftplan.optimizers._blockwise import Blockwise

VARIANTS: dict[str, dict[str, Any]] = {"rmsprop_bnb_32bit": {}, "rmsprop_bnb_8bit": {"optim_bits": 8}}
HARMLESS = frozenset({"alpha", "momentum", "centered"})


@final
@dataclass(frozen=True)
class RMSpropBnb(Blockwise):
    parts: ClassVar[tuple[int, ...]] = (1,)

    optim_bits: Literal[8, 32] = 32


OPTIMIZER = RMSpropBnb
EXAMPLES = (RMSpropBnb(), RMSpropBnb(optim_bits=8))
UNVERIFIED: dict[str, str] = {}
