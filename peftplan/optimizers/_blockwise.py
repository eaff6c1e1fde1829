"""What bitsandbytes' optimizers share (Dettmers 2022, arXiv:2110.02861): states of a byte with a scale per block.

bitsandbytes 0.50.2, bitsandbytes/optim/optimizer.py, Optimizer1State and Optimizer2State: a state is uint8 with an
fp32 absmax per 256 elements; weights below `min_8bit_size` elements keep fp32 states; each kind of state has one
256-entry fp32 code for the whole model. Paged: states of weights with at least 100,000 elements live in unified
memory, outside torch's allocator (get_state_buffer). On CUDA one kernel does the step and makes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from peftplan.optimizers.base import Optimizer, State, Trained
from peftplan.units import ceil_div

_BLOCK, _PAGED_FROM = 256, 100_000


@dataclass(frozen=True)
class Blockwise(Optimizer):
    """An optimizer of bitsandbytes. `parts`: for each state, how many tensors of the weight's size it stacks."""

    parts: ClassVar[tuple[int, ...]] = (1, 1)

    optim_bits: Literal[8, 32] = 8
    min_8bit_size: int = 4096
    is_paged: bool = False
    fp32_embeddings: bool = True
    """With 8 bits, states of embeddings are fp32, as transformers' Trainer sees to (create_optimizer)."""

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        packed = [self._packs(w) for w in weights]
        for w, packs in zip(weights, packed, strict=True):
            yield from self.states_of(w, backend, packs=packs)
        if any(packed):
            yield State(4 * 256, len(self.parts))

    def states_of(self, w: Trained, backend: str, *, packs: bool) -> Iterator[State]:
        host = self.is_paged and w.numel >= _PAGED_FROM and backend == "cuda"
        for stacked in self.parts:
            yield State(stacked * w.numel * (1 if packs else 4), w.copies, host=host)
            if packs:
                yield State(stacked * 4 * ceil_div(w.numel, _BLOCK), w.copies)

    def _packs(self, w: Trained) -> bool:
        wide = self.fp32_embeddings and w.is_embedding
        return self.optim_bits == 8 and w.numel >= self.min_8bit_size and not wide
