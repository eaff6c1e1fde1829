"""What GaLore, Q-GaLore and APOLLO share: which matrices are projected, and to what size.

transformers 5.23, trainer_optimizer.py, _setup_low_rank_optimizer: linear layers whose name contains one of
`optim_target_modules`, or matches it as a regular expression; weights that are not projected come first in the step.
GaLore's galore_projector.py (galore-torch 1.0): `std` projects the longer side of a matrix away, `reverse_std` the
shorter one, `right` the columns, `left` the rows, `full` both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftplan.errors import RequestError
from peftplan.optimizers.base import Locals, Optimizer, Trained, as_met

ALL_LINEAR = "all-linear"
Side = Literal["left", "right", "full"]


@dataclass(frozen=True)
class Projected(Optimizer):
    """Where the gradients of chosen matrices are projected to `rank` rows or columns."""

    rank: int = 128
    update_proj_gap: int = 200
    """Steps between projections. The peak is that of a step that makes them anew, whatever the gap."""
    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std"
    optim_target_modules: str | tuple[str, ...] = ("attn", "mlp")
    """Names or regular expressions, or all-linear. Default: those of GaLore's own script."""

    def __post_init__(self) -> None:
        patterns = self.optim_target_modules
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            if pattern != ALL_LINEAR and not _compiles(pattern):
                raise RequestError(f"optim_target_modules {pattern!r} is not a regular expression")
        if self.rank < 1:
            raise RequestError(f"optimizer.rank={self.rank}: give 1 or more")

    def projects(self, w: Trained) -> bool:
        linear = w.is_matrix and not w.is_embedding and w.name.endswith(".weight")
        return linear and self._chosen(w.name.removesuffix(".weight"))

    def _chosen(self, module: str) -> bool:
        wanted = self.optim_target_modules
        if isinstance(wanted, str):
            return wanted.replace("_", "-") == ALL_LINEAR or re.fullmatch(wanted, module) is not None
        return any(part in module or re.fullmatch(part, module) is not None for part in wanted)

    def order(self, weights: Sequence[Trained]) -> Iterator[Trained]:
        yield from as_met([w for w in weights if not self.projects(w)])
        yield from as_met([w for w in weights if self.projects(w)])

    def side(self, w: Trained) -> Side:
        """Which of its projections a matrix is multiplied with."""
        if self.proj_type in ("right", "left", "full"):
            return self.proj_type
        tall = w.shape[0] >= w.shape[1]
        return "right" if tall == (self.proj_type == "std") else "left"

    def low(self, w: Trained, rank: int) -> tuple[int, int]:
        """The projected gradient's shape."""
        rows, columns = w.shape
        return {"right": (rows, rank), "left": (rank, columns), "full": (rank, rank)}[self.side(w)]

    def svd_rank(self, w: Trained) -> int:
        """A matrix has no more singular vectors than rows or columns."""
        return min(self.rank, *w.shape)

    # -- singular vectors as a projection: GaLoreProjector ----------------------------------------------------------

    def kept_by_svd(self, w: Trained) -> tuple[int, ...]:
        """Bytes of each projection between steps. Of fp32 gradients it is a view, which keeps all singular vectors
        alive; of half-precision ones a copy of the first `rank`."""
        (rows, columns), short, rank = w.shape, min(w.shape), self.svd_rank(w)
        left, right = (rows * short, short * columns) if not w.dtype.is_half else (rows * rank, rank * columns)
        sizes = {"right": (right,), "left": (left,), "full": (left, right)}[self.side(w)]
        return tuple(w.dtype.size * size for size in sizes)

    def project_anew(self, local: Locals, w: Trained, backend: str) -> None:
        """get_orthogonal_matrix: an fp32 copy of a half-precision gradient, all singular vectors, and a product that
        nobody uses; on CUDA also the copy that cuSOLVER destroys (BatchLinearAlgebra.cpp, cloneBatchedColumnMajor).
        Its other workspace is not counted."""
        (rows, columns), short, rank, side = w.shape, min(w.shape), self.svd_rank(w), self.side(w)
        full, half = 4 * rows * columns, w.dtype.is_half
        local.bind("matrix", full if half else 0)
        vectors = 4 * (rows * short + short + short * columns)
        local.touch(vectors + (full if backend == "cuda" else 0))
        local.bind("U, s, Vh", vectors)
        unused = {"right": 4 * rows * rank, "left": 4 * rank * columns, "full": 0}[side]
        local.bind("unused", unused, beside=0 if side == "full" else 4 * rank * rank)
        if half:
            local.touch(sum(self.kept_by_svd(w)))
        local.drop("matrix", "U, s, Vh", "unused")

    def small(self, w: Trained) -> Trained:
        """A weight as the states of singular vectors' projections see it."""
        return w._replace(shape=self.low(w, self.svd_rank(w))) if self.projects(w) else w

    def stepped_8bit(self, local: Locals, w: Trained, *, projection: int = 0) -> None:
        """adamw8bit.py, step: a copy of the weight takes the weight's place, and the projected gradient the
        gradient's; the update is projected back (with `projection` bytes made for it) and scaled."""
        low = self.small(w).bytes
        local.shift(low)
        local.touch(w.bytes + low)
        local.shift(-w.bytes)
        local.touch(low + projection + 2 * w.bytes)


def _compiles(pattern: Any) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
