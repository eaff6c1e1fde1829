"""AdamW with 8-bit blockwise states (Dettmers 2022, arXiv:2110.02861) as bitsandbytes 0.50.2 keeps them.

bitsandbytes/optim/optimizer.py, Optimizer2State.init_state: two uint8 states and two fp32 absmax per 256 elements;
weights below 4,096 elements keep two fp32 states; two shared 256-entry fp32 codes. Paged: states of weights with at
least 100,000 elements live in unified memory, outside torch's allocator (get_state_buffer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from peftplan.optimizers.base import Optimizer, State, Trained
from peftplan.units import ceil_div

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw_bnb_8bit": {},
    "adamw8bit": {},
    "paged_adamw_8bit": {"is_paged": True},
    "paged_adamw_32bit": {"is_paged": True, "optim_bits": 32},
    "paged_adamw": {"is_paged": True, "optim_bits": 32},
    "adamw_32bit": {"optim_bits": 32},
}
_BLOCK, _PAGED_FROM = 256, 100_000


@final
@dataclass(frozen=True)
class AdamW8bit(Optimizer):
    optim_bits: Literal[8, 32] = 8
    min_8bit_size: int = 4096
    is_paged: bool = False

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        any_packed = False
        for w in weights:
            host = self.is_paged and w.numel >= _PAGED_FROM and backend == "cuda"
            if self.optim_bits == 32 or w.numel < self.min_8bit_size:
                yield State(4 * w.numel, 2 * w.copies, host=host)
                continue
            any_packed = True
            yield State(w.numel, 2 * w.copies, host=host)
            yield State(4 * ceil_div(w.numel, _BLOCK), 2 * w.copies)
        if any_packed:
            yield State(4 * 256, 2)

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        del weights, backend
        return 0


OPTIMIZER = AdamW8bit
EXAMPLES = (AdamW8bit(), AdamW8bit(is_paged=True), AdamW8bit(is_paged=True, optim_bits=32))
UNVERIFIED: dict[str, str] = {}
