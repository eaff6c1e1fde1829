"""GrokAdamW (Hartford 2024) as grokadamw 0.1.2 runs it: three states, kept in host memory between their steps.

Mirrors grokadamw/grokadamw.py, _update_group: both moments and an average of the gradients, of the weight's own dtype,
are made on the CPU and copied to the GPU and back for each weight; the amplified gradient is made besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from peftplan.optimizers.base import Locals, Optimizer, State, Trained

VARIANTS: dict[str, dict[str, Any]] = {}
HARMLESS = frozenset({"alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"})


@final
@dataclass(frozen=True)
class GrokAdamW(Optimizer):
    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        return (State(w.bytes, 3 * w.copies, host=backend == "cuda") for w in weights)

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        for state in ("exp_avg", "exp_avg_sq", "grok_ema"):
            local.bind(state, w.bytes if backend == "cuda" else 0)
        local.bind("grok_grad", w.bytes, beside=w.bytes)
        local.touch(w.bytes)


OPTIMIZER = GrokAdamW
EXAMPLES = (GrokAdamW(),)
UNVERIFIED: dict[str, str] = {}
