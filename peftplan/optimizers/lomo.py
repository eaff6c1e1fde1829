"""LOMO (Lv 2023, arXiv:2306.09782) as lomo-optim 0.1.1 runs it: SGD in backward, without any state.

Mirrors lomo_optim/lomo.py, Lomo.fuse_update: a hook on every weight updates the weight whose gradient came before and
lets that gradient go, so that two gradients are there at most; for a half-precision weight with fp32 copies of gradient
and weight. `clip_grad_norm` runs backward twice; the peak is that of either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from peftplan.optimizers.base import Optimizer, State, Trained

VARIANTS: dict[str, dict[str, Any]] = {}
HARMLESS = frozenset({"clip_grad_norm", "clip_grad_value", "loss_scale_args"})


@final
@dataclass(frozen=True)
class Lomo(Optimizer):
    late: ClassVar[bool] = True

    in_backward: bool = True

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        del weights, backend
        return iter(())

    def update_bytes(self, w: Trained, backend: str) -> int:
        """The half-precision gradient goes when its fp32 copy is there."""
        del backend
        return 4 * w.numel + max(0, 4 * w.numel - w.bytes) if w.dtype.is_half else 0


OPTIMIZER = Lomo
EXAMPLES = (Lomo(),)
UNVERIFIED: dict[str, str] = {}
