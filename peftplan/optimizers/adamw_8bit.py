"""AdamW with 8-bit blockwise states (Dettmers 2022, arXiv:2110.02861) as bitsandbytes 0.50.2 keeps them.

bitsandbytes/optim/optimizer.py, Optimizer2State.init_state: two uint8 states and two fp32 absmax per 256 elements;
weights below 4,096 elements keep two fp32 states; two shared 256-entry fp32 codes. Paged: states of weights with at
least 100,000 elements live in unified memory, outside torch's allocator (get_state_buffer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from peftplan.optimizers._blockwise import Blockwise

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw_bnb_8bit": {},
    "adamw8bit": {},
    "paged_adamw_8bit": {"is_paged": True},
    "paged_adamw_32bit": {"is_paged": True, "optim_bits": 32},
    "paged_adamw": {"is_paged": True, "optim_bits": 32},
    "adamw_32bit": {"optim_bits": 32},
}


@final
@dataclass(frozen=True)
class AdamW8bit(Blockwise):
    pass


OPTIMIZER = AdamW8bit
EXAMPLES = (
    AdamW8bit(),
    AdamW8bit(is_paged=True),
    AdamW8bit(is_paged=True, optim_bits=32),
    AdamW8bit(fp32_embeddings=False),
)
UNVERIFIED: dict[str, str] = {}
