"""LoKr: the weight changes by a Kronecker product, one or both factors of low rank (Yeh 2024, arXiv:2309.14859, 3.2).

Trains: w1 (o1 x i1) and w2 (o2 x i2), where o1 o2 = out and i1 i2 = in, w2 as a product of rank r while r is below
half its longer side, w1 so with `decompose_both`; plus copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype, both factors, and the whole change of its weight.
Not modelled: module_dropout skips a layer's branch at random: a step that skips none is meant, which errs high;
embeddings, 4-bit bases (PEFT fails on them).
Mirrors peft/tuners/lokr/layer.py Linear.forward, make_kron and factorization, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Tensor
from peftplan.graph.edit import Module
from peftplan.methods import _lycoris
from peftplan.units import DType

HARMLESS = _lycoris.HARMLESS | {"rank_dropout_scale"}


@final
@dataclass(frozen=True)
class Lokr(_lycoris.Lycoris):
    """PEFT's LoKrConfig, the knobs that change memory."""

    decompose_both: bool = False
    decompose_factor: int = -1
    title: ClassVar[str] = "LoKr"
    no_4bit: ClassVar[str] = "PEFT gives the change the packed weight's shape, which is not the layer's"

    def check(self) -> None:
        super().check()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise RequestError(f"method.decompose_factor={self.decompose_factor}: use a divisor, or -1 for the middle")

    def drop_dtype(self, weight: Tensor) -> DType:
        del weight
        return DType.float32

    def delta(self, b: Builder, module: Module, rank: int, dtype: DType) -> Tensor:
        """`kron(w1, w2) * scale`: one product of the factors' views, and its multiple."""
        o1, o2 = split(module.out_features, self.decompose_factor)
        i1, i2 = split(module.in_features, self.decompose_factor)
        low1 = self.decompose_both and 2 * rank < max(o1, i1)
        low2 = 2 * rank < max(o2, i2)
        first = _weights(b, "lokr_w1", (o1, i1), rank if low1 else None, dtype)
        second = _weights(b, "lokr_w2", (o2, i2), rank if low2 else None, dtype)
        b.hold(*first, *second)  # in the order they are registered in, before they are used in another
        w1, w2 = _factor(b, "lokr_w1", first), _factor(b, "lokr_w2", second)
        kron = b.kron(w1, w2, module.out_features, module.in_features)
        weight = b.scale(kron, label="kron_scaled")
        b.hold(w1, w2)
        return weight


def _weights(b: Builder, label: str, shape: tuple[int, int], rank: int | None, dtype: DType) -> tuple[Tensor, ...]:
    """A factor as one weight, or as two whose product it is."""
    if rank is None:
        return (b.weight(label, *shape, dtype=dtype, kind=ADAPTER),)
    left = b.weight(f"{label}_a", shape[0], rank, dtype=dtype, kind=ADAPTER)
    return left, b.weight(f"{label}_b", rank, shape[1], dtype=dtype, kind=ADAPTER)


def _factor(b: Builder, label: str, weights: tuple[Tensor, ...]) -> Tensor:
    if len(weights) == 1:
        return weights[0]
    left, right = weights
    return b.matmul(left, right, left.shape[0], right.shape[1], inner=right.shape[0], label=label)


def split(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product of two, the smaller first: `factor` and the rest where it divides, else the divisors
    closest to each other whose smaller is not above `factor` (-1: no bound)."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = size if factor == -1 else factor
    small = max(d for d in range(1, min(bound, int(size**0.5)) + 1) if size % d == 0)
    return small, size // small


METHOD = Lokr
EXAMPLES = (Lokr(), Lokr(r=2, decompose_both=True, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
