"""AdamW with states of 4 or 8 bits or in fp8, as torchao 0.18 keeps them.

Dettmers 2022 (arXiv:2110.02861), Li 2023 (arXiv:2309.01507). Mirrors torchao/optim/adam.py, _AdamBase._new_buffer, and
subclass_4bit.py, subclass_8bit.py, subclass_fp8.py: weights of at least 4,096 elements that blocks divide have packed
states with an fp32 scale per block (and each a code of its own, of 16 or 256 floats); the others have states of their
own dtype. The step counter is on the host. The step is compiled by Inductor, one weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from peftplan.optimizers.base import Optimizer, State, Trained

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw_torch_4bit": {"bits": 4},
    "adamw_torch_8bit": {},
    "ao_adamw_4bit": {"bits": 4, "block_size": 128},
    "ao_adamw_8bit": {},
    "ao_adamw_fp8": {"bits": "fp8"},
}
HARMLESS = frozenset({"bf16_stochastic_round"})
_SMALLEST = 4096


@final
@dataclass(frozen=True)
class AdamWLowBit(Optimizer):
    bits: Literal[4, 8, "fp8"] = 8
    block_size: int = 256
    amsgrad: bool = False

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        for w in weights:
            times = w.copies * (2 + self.amsgrad)
            yield State(4, w.copies, host=backend == "cuda")
            if w.numel < _SMALLEST or w.numel % self.block_size:
                yield State(w.bytes, times)
                continue
            yield State(w.numel // 2 if self.bits == 4 else w.numel, times)
            yield State(4 * (w.numel // self.block_size), times)
            if self.bits != "fp8":
                yield State(4 * 2**self.bits, times)


OPTIMIZER = AdamWLowBit
EXAMPLES = (AdamWLowBit(), AdamWLowBit(bits=4, block_size=128), AdamWLowBit(bits="fp8"), AdamWLowBit(amsgrad=True))
UNVERIFIED: dict[str, str] = {
    "the step's temporaries": "Inductor decides what its kernels write out; counted as nothing, which errs low by at "
    "most a few fp32 copies of one weight"
}
