"""GaLore (Zhao 2024, arXiv:2403.03507) as galore-torch 1.0 runs it: AdamW's states of a projected gradient.

Mirrors galore_torch/adamw.py, adamw8bit.py and adafactor.py with galore_projector.py: the gradients of chosen matrices
are projected to `rank` rows or columns by singular vectors, found anew every `update_proj_gap` steps; states have the
projected size; the update is projected back and scaled into new tensors of the weight's size. Projections of fp32
gradients are views that keep all singular vectors of the shorter side.

`base`: `adamw` (states of the gradient's dtype), `adamw_8bit` (bitsandbytes' blockwise states; the gradient dies when
it is projected, the weight is copied) or `adafactor` (fp32, with every gradient upcast). `--method galore` is full
fine-tuning with this optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, final

from peftplan.optimizers._blockwise import Blockwise
from peftplan.optimizers._factored import refine
from peftplan.optimizers._projected import Projected
from peftplan.optimizers.adafactor import Adafactor
from peftplan.optimizers.base import Locals, State, Trained
from peftplan.units import DType

VARIANTS: dict[str, dict[str, Any]] = {
    "galore_adamw": {},
    "galore_adamw_8bit": {"base": "adamw_8bit"},
    "galore_adafactor": {"base": "adafactor"},
    "galore_adamw_layerwise": {"in_backward": True},
    "galore_adamw_8bit_layerwise": {"base": "adamw_8bit", "in_backward": True},
    "galore_adafactor_layerwise": {"base": "adafactor", "in_backward": True},
}
HARMLESS = frozenset({"scale"})
_UNORM = 4
"""galore-torch 1.0 passes arguments of an older bitsandbytes, which today's takes for `max_unorm`: a float a weight."""


@final
@dataclass(frozen=True)
class GaLore(Projected):
    base: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        worked_on = [self._worked_on(w) for w in weights]
        for w in worked_on:
            if self.projects(w):
                yield from (State(size, w.copies) for size in self.kept_by_svd(w))
        small = [self.small(w) for w in worked_on]
        if self.base == "adamw":
            yield from (State(w.bytes, 2 * w.copies) for w in small)
        elif self.base == "adafactor":
            yield from Adafactor().states(small, backend)
        else:
            yield from Blockwise(fp32_embeddings=False).states(small, backend)
            yield from (State(_UNORM, w.copies) for w in weights)

    def _worked_on(self, w: Trained) -> Trained:
        """A weight in its gradient's dtype."""
        return w._replace(dtype=DType.float32) if self.base == "adafactor" else w

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        by_base = {"adamw": self._adamw, "adamw_8bit": self._adamw_8bit, "adafactor": self._adafactor}
        by_base[self.base](local, w, backend)

    def _adamw(self, local: Locals, w: Trained, backend: str) -> None:
        local.bind("grad", 0)
        low = self._project(local, w, backend, "grad")
        local.bind("denom", low)
        local.bind("norm_grad", low)
        if self.projects(w):
            local.bind("norm_grad", w.bytes, beside=w.bytes)

    def _adamw_8bit(self, local: Locals, w: Trained, backend: str) -> None:
        if self.projects(w):
            self.project_anew(local, w, backend)
            self.stepped_8bit(local, w)

    def _adafactor(self, local: Locals, w: Trained, backend: str) -> None:
        full, wide = 4 * w.numel, w._replace(dtype=DType.float32)
        upcast = full if w.dtype.is_half else 0
        local.bind("grad", 0)
        local.bind("grad", upcast)
        self._project(local, wide, backend, "grad")
        local.bind("weight", 0)
        local.bind("weight", upcast)
        refine(local, self.small(wide).shape)
        if self.projects(w):
            local.bind("update", full, beside=full)
        local.touch(full)

    def _project(self, local: Locals, w: Trained, backend: str, name: str) -> int:
        """Bytes of the gradient that the states take in, bound to `name`."""
        if not self.projects(w):
            return w.bytes
        self.project_anew(local, w, backend)
        low = w.dtype.size * prod(self.small(w).shape)
        local.bind(name, low)
        return low


OPTIMIZER = GaLore
EXAMPLES = (
    GaLore(rank=8),
    GaLore(rank=8, base="adamw_8bit"),
    GaLore(rank=8, base="adafactor"),
    GaLore(rank=8, in_backward=True),
    GaLore(rank=8, proj_type="full", optim_target_modules="all-linear"),
)
UNVERIFIED: dict[str, str] = {
    "cuSOLVER's workspace": "no trace shows what the decomposition takes on CUDA besides a copy of its input; errs low"
}
