"""Rotations made of a skew-symmetric matrix Q: what OFT and PSOFT share."""

from __future__ import annotations

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import Tensor


def check_terms(terms: int) -> None:
    if terms < 2:
        raise RequestError(f"method.num_cayley_neumann_terms={terms}: use at least 2")


def neumann(b: Builder, start: Tensor, skew: Tensor, terms: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """I + 2 Q + 2 Q^2 + ... + Q^n, summed into `start` in place; with it, the powers that keep names."""
    total = b.add_into(start, skew, scaled=True)
    power, powers = skew, [skew]
    last = 1 if terms == 2 else max(3, terms - 1)
    for n in range(2, last + 1):
        power = b.matmul(power, skew, *skew.shape, inner=skew.shape[-1], label="power")
        powers.append(power)
        total = b.add_into(total, power, scaled=n < last)
    return total, (*powers[:2], power)
