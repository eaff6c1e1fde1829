"""Q-GaLore (Zhang 2024, arXiv:2407.08296) as q-galore-torch 1.0 runs it: GaLore's 8-bit AdamW with packed projections.

Mirrors q_galore_torch/q_galore_adamw8bit.py and q_galore_projector.py: projections are held in a byte an element
whatever `quant_n_bit`, with a scale and a zero per `quant_group_size` elements of the gradient's dtype, and the first
singular vector of the last projection beside them; states are bitsandbytes' blockwise ones. A float projection is made
for each product. INT8 weights (`--weight_quant` of its script) are not modelled: the weights have their own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from peftplan.errors import RequestError
from peftplan.optimizers._blockwise import Blockwise
from peftplan.optimizers._projected import Projected
from peftplan.optimizers.base import Locals, State, Trained

VARIANTS: dict[str, dict[str, Any]] = {"q_galore_adamw8bit": {}, "q_galore_adamw_8bit": {}}
HARMLESS = frozenset({"scale", "quant_n_bit", "cos_threshold", "gamma_proj", "queue_size"})


@final
@dataclass(frozen=True)
class QGaLore(Projected):
    quant: bool = True
    quant_group_size: int = 256

    def __post_init__(self) -> None:
        Projected.__post_init__(self)
        if self.proj_type != "std":
            raise RequestError(f"optimizer.proj_type={self.proj_type}: q-galore-torch has only std; leave it out")

    def _projection(self, w: Trained) -> int:
        """Elements of the projection."""
        return self.svd_rank(w) * w.shape[self.side(w) == "right"]

    def _kept(self, w: Trained) -> tuple[int, ...]:
        first = w.dtype.size * w.shape[self.side(w) == "right"]
        if not self.quant:
            return (*self.kept_by_svd(w), first)
        numel, group = self._projection(w), self.quant_group_size
        if numel % group:
            raise RequestError(
                f"optimizer.quant_group_size={group} does not divide the projection of {w.name}; give one that does"
            )
        return numel, w.dtype.size * (numel // group), w.dtype.size * (numel // group), first

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        for w in weights:
            if self.projects(w):
                yield from (State(size, w.copies) for size in self._kept(w))
        yield from Blockwise(fp32_embeddings=False).states([self.small(w) for w in weights], backend)

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        if not self.projects(w):
            return
        floats = w.dtype.size * self._projection(w) if self.quant else 0
        self.project_anew(local, w, backend)
        if self.quant:
            self._pack(local, w, floats)
        local.bind("float_ortho_matrix", floats, beside=floats)
        local.touch(self.small(w).bytes)
        local.drop("float_ortho_matrix")
        self.stepped_8bit(local, w, projection=floats)

    def _pack(self, local: Locals, w: Trained, floats: int) -> None:
        """_quantize: the singular vectors, and three tensors of their size on the way to bytes."""
        local.bind("float_ortho_matrix", sum(self.kept_by_svd(w)))
        local.touch(sum(self._kept(w)) + 2 * floats)
        local.drop("float_ortho_matrix")


OPTIMIZER = QGaLore
EXAMPLES = (QGaLore(rank=8, quant_group_size=8), QGaLore(rank=8, quant=False))
UNVERIFIED: dict[str, str] = {
    "its own update_step": "q-galore-torch 1.0 asks for a bitsandbytes of 2024; states and projections are held "
    "against its code with the update of bitsandbytes 0.50.2"
}
