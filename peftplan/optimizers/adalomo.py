"""AdaLomo (Lv 2023, arXiv:2310.10195) as lomo-optim 0.1.1 runs it: Adafactor's second moments, updated in backward.

Mirrors lomo_optim/adalomo.py: fp32 rows and columns of every matrix, whether it trains or not (here: of those that
train, which errs low with frozen ones), and LOMO's hooks; per weight the fp32 gradient, its square, the update, and an
fp32 copy of a half-precision weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from peftplan.optimizers._factored import factors, refine
from peftplan.optimizers.base import Locals, Optimizer, State, Trained

VARIANTS: dict[str, dict[str, Any]] = {}
HARMLESS = frozenset({"clip_grad_norm", "clip_grad_value", "loss_scale", "clip_threshold", "decay_rate"})


@final
@dataclass(frozen=True)
class AdaLomo(Optimizer):
    late: ClassVar[bool] = True

    in_backward: bool = True

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        del backend
        return (State(4 * numel, w.copies) for w in weights for numel in factors(w.shape))

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        del backend
        half = w.dtype.is_half
        if half:
            local.bind("grad_fp32", 4 * w.numel)
            local.bind("gradient", -w.bytes)
        refine(local, w.shape)
        if half:
            local.touch(4 * w.numel)


OPTIMIZER = AdaLomo
EXAMPLES = (AdaLomo(),)
UNVERIFIED: dict[str, str] = {}
