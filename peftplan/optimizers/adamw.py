"""AdamW (Loshchilov 2019, arXiv:1711.05101) as torch.optim.AdamW runs it: two states of each weight's own dtype.

Mirrors torch 2.13, torch/optim/adam.py: _single_tensor_adam (`for-loop`) makes sqrt(v) and its quotient per weight,
_multi_tensor_adam (`foreach`) makes sqrt(v) of all weights of one dtype at once, _fused_adam makes nothing.
bf16 weights have bf16 states and no master copy. The step counter is a 4-byte tensor per weight, on the host unless
fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, final

from peftplan.optimizers.base import Optimizer, State, Trained
from peftplan.units import DType

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw_torch": {},
    "adamw_torch_foreach": {"impl": "foreach"},
    "adamw_torch_fused": {"impl": "fused"},
    "adamw_fused": {"impl": "fused"},
    "adamw_foreach": {"impl": "foreach"},
    "adamw_for_loop": {"impl": "for-loop"},
}


@final
@dataclass(frozen=True)
class AdamW(Optimizer):
    impl: Literal["auto", "for-loop", "foreach", "fused"] = "auto"
    """auto: torch's own choice, foreach on CUDA, for-loop on CPU."""

    def resolved(self, backend: str) -> str:
        if self.impl != "auto":
            return self.impl
        return "foreach" if backend == "cuda" else "for-loop"

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        step_on_host = backend == "cuda" and self.resolved(backend) != "fused"
        for w in weights:
            yield State(w.bytes, 2 * w.copies)
            yield State(4, w.copies, host=step_on_host)

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        how = self.resolved(backend)
        if how == "fused":
            return 0
        return _foreach_bytes(weights) if how == "foreach" else _for_loop_bytes(weights)


def _foreach_bytes(weights: Sequence[Trained]) -> int:
    """sqrt(v) per dtype group; the name still holds the group before while the next is made."""
    groups: dict[DType, int] = {}
    for w in weights:
        groups[w.dtype] = groups.get(w.dtype, 0) + w.bytes * w.copies
    sizes = list(groups.values())
    return max((a + b for a, b in zip([0, *sizes], sizes, strict=False)), default=0)


def _for_loop_bytes(weights: Sequence[Trained]) -> int:
    """`denom = (v.sqrt() / c).add_(eps)`: the root, the quotient, and the denominator of the weight before.

    Weights of equal layers are neighbours in the order the layers use them, and the last one of a layer is the
    neighbour of the first one of the next. Where runs of different layers are equally long, this may err high.
    """
    before = largest = 0
    for copies, run in groupby(weights, key=lambda w: w.copies):
        if copies > 1:
            layer = list(run)
            largest = max(largest, layer[-1].bytes + 2 * layer[0].bytes)
    for w in weights:
        largest = max(largest, before + 2 * w.bytes)
        before = w.bytes
    return largest


OPTIMIZER = AdamW
EXAMPLES = (AdamW(), AdamW(impl="fused"), AdamW(impl="foreach"), AdamW(impl="for-loop"))
UNVERIFIED: dict[str, str] = {}
