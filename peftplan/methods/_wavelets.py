"""The inverse wavelet transform of one level, as peft/tuners/waveft/waverec2d.py has it, peft 0.21.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.builder import Builder
from peftplan.graph.core import Grad, Need, Op, Tensor

LENGTHS = {
    **{f"db{n}": 2 * n for n in range(1, 11)},
    **{f"sym{n}": 2 * n for n in range(2, 11)},
    **{f"coif{n}": 6 * n for n in range(1, 5)},
}
"""Length of each wavelet's filter (wavelet.py); constants.py names more, for which there is no filter or, coif5, a
wrong reduction: their forward fails."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruct(Op):
    """conv_transpose2d with stride 2: ins = (bands, filter); keeps both, the filter is frozen."""

    def flops(self) -> int:
        bands, kernel = self.ins
        return 2 * bands.numel * kernel.shape[-1] ** 2

    def grad_flops(self, need: Need) -> int:
        return self.flops() if self.ins[0].name in need else 0

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return self.ins if self.ins[0].name in need else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        bands = self.ins[0]
        return (Grad(bands, bands.logical_bytes),) if bands.name in need else ()


def reconstructed(b: Builder, placed: Tensor, length: int) -> Tensor:
    """waverec2d of one level, less the filter's overhang."""
    (rows, columns), dtype = placed.shape, placed.dtype
    taps = b.plain("taps", 3, length, dtype=dtype)
    outer = b.plain("outer", 4, length, length, dtype=dtype)
    kernel = b.plain("filter", 4, 1, length, length, dtype=dtype, ins=(outer,))
    half, quarter = (rows // 2, columns), (rows // 2, columns // 2)
    bands = tuple(b.slice(b.slice(placed, *half, label="half"), *quarter, label="band") for _ in range(4))
    stacked = b.concat(bands, 1, 4, *quarter, label="bands")
    filters, given = b.autocast(kernel), b.autocast(stacked)
    name = b.name("reconstructed")
    whole = Tensor(name, (rows + length - 2, columns + length - 2), given.dtype)
    b.ops.append(Reconstruct(name=name, ins=(given, filters), out=whole, part="down"))
    b.hold(taps, kernel, stacked)
    over = length - 2
    for down, right in ((1, 0), (2, 0), (2, 1), (2, 2)) if over else ():
        shape = (rows + over * (1 - down), columns + over * (1 - right))
        whole = b.slice(whole, *shape, label="inner")
    return whole
