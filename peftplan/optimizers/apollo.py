"""APOLLO and APOLLO-Mini (Zhu 2024, arXiv:2412.05270) as apollo-torch 1.0.3 runs them: states of a projected gradient.

Mirrors apollo_torch/apollo.py with random_projector.py and svd_projector.py: the gradients of chosen matrices are
projected to `rank` rows or columns, by a random matrix or by singular vectors; AdamW's states of that size tell how to
scale the gradient itself, by row or column (`channel`) or as a whole (`tensor`). The step makes two tensors of the
weight's size, and an fp32 copy of a half-precision gradient where it draws a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, final

from peftplan.errors import RequestError
from peftplan.optimizers._projected import Projected
from peftplan.optimizers.base import Locals, State, Trained

VARIANTS: dict[str, dict[str, Any]] = {
    "apollo_adamw": {},
    "apollo_mini": {"rank": 1, "scale_type": "tensor"},
    "apollo_adamw_layerwise": {"in_backward": True},
}
HARMLESS = frozenset({"scale", "scale_front", "disable_nl", "correct_bias"})


@final
@dataclass(frozen=True)
class Apollo(Projected):
    proj: Literal["random", "svd"] = "random"
    scale_type: Literal["channel", "tensor"] = "channel"

    def __post_init__(self) -> None:
        Projected.__post_init__(self)
        if self.proj_type == "full" and self.proj == "random":
            raise RequestError("optimizer.proj_type=full: apollo-torch has no random one; set optimizer.proj=svd")

    def _low(self, w: Trained) -> tuple[int, ...]:
        if not self.projects(w):
            return w.shape
        return self.low(w, self.svd_rank(w) if self.proj == "svd" else self.rank)

    def _kept(self, w: Trained) -> tuple[int, ...]:
        """Bytes of the projection."""
        if self.proj == "svd":
            return self.kept_by_svd(w)
        return (w.dtype.size * self.rank * w.shape[self.side(w) == "right"],)

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        del backend
        for w in weights:
            yield State(w.dtype.size * prod(self._low(w)), 2 * w.copies)
            if self.projects(w):
                yield from (State(size, w.copies) for size in self._kept(w))
                yield State(w.dtype.size, w.copies)

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        low, size = self._low(w), w.dtype.size
        local.bind("grad", 0)
        if self.projects(w):
            self._draw(local, w, backend)
            local.bind("grad", size * prod(low))
        local.bind("denom", size * prod(low))
        local.bind("norm_grad", size * prod(low))
        if self.projects(w):
            self._scale(local, w, low)

    def _draw(self, local: Locals, w: Trained, backend: str) -> None:
        if self.proj == "svd":
            self.project_anew(local, w, backend)
            return
        drawn = 4 * self.rank * w.shape[self.side(w) == "right"]
        local.bind("matrix", 4 * w.numel if w.dtype.is_half else 0)
        local.bind("proj", drawn, beside=drawn)
        if w.dtype.is_half:
            local.bind("proj", drawn // 2)
        local.drop("matrix", "proj")

    def _scale(self, local: Locals, w: Trained, low: tuple[int, ...]) -> None:
        size = w.dtype.size
        factors = size * low[w.shape[0] < w.shape[1]] if self.scale_type == "channel" else size
        local.bind("factor", factors, beside=2 * factors)
        local.bind("scaled_grad", w.bytes)
        local.bind("scaled_grad_norm", size)
        local.bind("limiter", size, beside=size)
        local.bind("scaled_grad", w.bytes)
        local.bind("norm_grad", 0)


OPTIMIZER = Apollo
EXAMPLES = (
    Apollo(rank=8),
    Apollo(rank=1, scale_type="tensor"),
    Apollo(rank=8, proj="svd"),
    Apollo(rank=8, in_backward=True),
)
UNVERIFIED: dict[str, str] = {
    "cuSOLVER's workspace": "with proj=svd, no trace shows what the decomposition takes on CUDA besides; errs low"
}
