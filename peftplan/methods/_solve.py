"""The exact Cayley transform of BOFT and OFT."""

from __future__ import annotations

from peftplan.graph.builder import Builder
from peftplan.graph.core import Tensor
from peftplan.units import DType


def cayley(b: Builder, skew: Tensor) -> Tensor:
    """(I - S)(I + S)^-1 of skew-symmetric blocks, beside an fp32 identity; in fp32 at least."""
    eye = b.plain("identity", *skew.shape[-2:], dtype=DType.float32)
    plus = b.add(eye, skew, label="plus")
    minus = b.minus(eye, skew, label="minus")
    out = b.solve(plus, minus)
    b.hold(skew, eye)
    return out
