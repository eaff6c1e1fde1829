"""AnyPrecisionAdamW as torchdistx 0.2 keeps it: states of any dtype, and on demand a Kahan compensation.

torchdistx/optimizers/anyprecision_optimizer.py: a momentum and a variance in dtypes of their own (transformers asks for
fp32 both), and with `use_kahan_summation` a buffer; per weight the root of the variance, its quotient, and a copy of
the weight for the compensation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from peftplan.optimizers.base import Locals, Optimizer, State, Trained
from peftplan.units import parse_dtype

VARIANTS: dict[str, dict[str, Any]] = {}
Float = Literal["float32", "bfloat16", "float16"]


@final
@dataclass(frozen=True)
class AdamWAnyPrecision(Optimizer):
    momentum_dtype: Float = "float32"
    variance_dtype: Float = "float32"
    compensation_buffer_dtype: Float = "bfloat16"
    use_kahan_summation: bool = False

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        dtypes = [self.momentum_dtype, self.variance_dtype]
        dtypes += [self.compensation_buffer_dtype] if self.use_kahan_summation else []
        for w in weights:
            yield from (State(w.numel * parse_dtype(dtype).size, w.copies) for dtype in dtypes)
            yield State(4, w.copies, host=backend == "cuda")

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        del backend
        variance = w.numel * parse_dtype(self.variance_dtype).size
        local.bind("centered_variance", variance, beside=variance)
        if self.use_kahan_summation:
            local.bind("temp_buffer", w.bytes)


OPTIMIZER = AdamWAnyPrecision
EXAMPLES = (AdamWAnyPrecision(), AdamWAnyPrecision(use_kahan_summation=True, momentum_dtype="bfloat16"))
UNVERIFIED: dict[str, str] = {"costs": "torchdistx needs a torch of 2022; the counts are read off its code"}
