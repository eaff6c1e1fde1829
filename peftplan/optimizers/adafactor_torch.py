"""Adafactor as torch.optim.Adafactor runs it: rows and columns of matrices in the weight's own dtype.

Mirrors torch 2.13, torch/optim/_adafactor.py: a matrix keeps the variance of its rows and of its columns, a vector its
own; the step makes the estimated variance of each weight (_single_tensor_adafactor), or of all matrices of one dtype
and then of all vectors (_multi_tensor_adafactor). The step counter is on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from peftplan.optimizers._factored import factors
from peftplan.optimizers._torch import Loop, resolved
from peftplan.optimizers.base import Locals, Optimizer, State, Trained
from peftplan.units import DType

VARIANTS: dict[str, dict[str, Any]] = {"torch_adafactor": {}}
HARMLESS = frozenset({"beta2_decay", "d", "maximize"})


@final
@dataclass(frozen=True)
class AdafactorTorch(Optimizer):
    impl: Loop = "auto"

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        for w in weights:
            for numel in factors(w.shape):
                yield State(w.dtype.size * numel, w.copies)
            yield State(4, w.copies, host=backend == "cuda")

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        if resolved(self.impl, backend) == "for-loop":
            return super().step_bytes(weights, backend)
        local = Locals()
        for group in _groups(weights).values():
            _all_at_once(local, group)
        return local.peak

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        del backend
        if w.is_matrix:
            rows, columns = (w.dtype.size * numel for numel in factors(w.shape))
            local.bind("row_mean", rows)
            local.bind("col_mean", columns)
        else:
            local.bind("grad_squared", w.bytes)
        local.bind("update", w.bytes, beside=w.dtype.size if w.is_matrix else 0)


def _groups(weights: Sequence[Trained]) -> dict[tuple[DType, bool], list[Trained]]:
    groups: dict[tuple[DType, bool], list[Trained]] = {}
    for dtype in dict.fromkeys(w.dtype for w in weights):
        for w in weights:
            if w.dtype is dtype:
                groups.setdefault((dtype, w.is_matrix), []).append(w)
    return groups


def _all_at_once(local: Locals, group: Sequence[Trained]) -> None:
    total = sum(w.bytes * w.copies for w in group)
    if group[0].is_matrix:
        for which in (0, 1):
            local.touch(sum(w.dtype.size * factors(w.shape)[which] * w.copies for w in group))
    else:
        local.touch(total)
    local.bind("updates", total)
    local.touch(sum(w.dtype.size * w.copies for w in group if w.is_matrix))


OPTIMIZER = AdafactorTorch
EXAMPLES = (AdafactorTorch(), AdafactorTorch(impl="for-loop"), AdafactorTorch(impl="foreach"))
UNVERIFIED: dict[str, str] = {}
