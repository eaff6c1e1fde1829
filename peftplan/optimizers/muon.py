"""Muon (Jordan 2024) on the hidden matrices, AdamW on the rest, as torch.optim.Muon and torch.optim.AdamW run them.

Mirrors torch 2.13, torch/optim/_muon.py: a matrix keeps one momentum of its own dtype; the step orthogonalises it in
bf16, five Newton-Schulz steps of two square matrices of its shorter side each (_zeropower_via_newtonschulz). Hidden
matrices are all but embeddings and the head. What AdamW trains is as in adamw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from peftplan.optimizers._torch import Impl
from peftplan.optimizers.adamw import AdamW
from peftplan.optimizers.base import Locals, Optimizer, State, Trained
from peftplan.units import DType

VARIANTS: dict[str, dict[str, Any]] = {}
HARMLESS = frozenset({"momentum", "ns_coefficients", "adjust_lr_fn"})


@final
@dataclass(frozen=True)
class Muon(Optimizer):
    nesterov: bool = True
    ns_steps: int = 5
    impl: Impl = "auto"
    """Of AdamW on the rest."""

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        yield from (State(w.bytes, w.copies) for w in weights if is_hidden(w))
        yield from self._adamw().states([w for w in weights if not is_hidden(w)], backend)

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        rest = self._adamw().step_bytes([w for w in weights if not is_hidden(w)], backend)
        return max(super().step_bytes([w for w in weights if is_hidden(w)], backend), rest)

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        del backend
        short, ortho = min(w.shape), 2 * w.numel
        local.bind("update", w.bytes if self.nesterov else 0)
        local.bind("ortho", 0 if w.dtype is DType.bfloat16 else ortho)
        for _ in range(min(self.ns_steps, 2)):
            local.bind("gram_matrix", 2 * short * short)
            local.bind("gram_update", 2 * short * short)
            local.bind("ortho", ortho)
        local.drop("gram_matrix", "gram_update", "ortho")
        local.bind("update", 0)
        local.bind("update", ortho)

    def _adamw(self) -> AdamW:
        return AdamW(impl=self.impl)


def is_hidden(w: Trained) -> bool:
    """What Muon's authors give it: matrices that are neither an embedding nor the head."""
    return w.is_matrix and not w.is_embedding and "lm_head" not in w.name


OPTIMIZER = Muon
EXAMPLES = (Muon(), Muon(nesterov=False), Muon(impl="fused"))
UNVERIFIED: dict[str, str] = {}
