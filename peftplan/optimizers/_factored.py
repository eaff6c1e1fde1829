"""Second moments of a matrix by their rows and columns (Shazeer and Stern 2018, arXiv:1804.04235)."""

from __future__ import annotations

from math import prod

from peftplan.optimizers.base import Locals


def factors(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements of the states: rows and columns of what has two dimensions or more, else the whole."""
    if len(shape) < 2:
        return (prod(shape),)
    return prod(shape[:-1]), prod(shape[:-2]) * shape[-1]


def refine(local: Locals, shape: tuple[int, ...]) -> None:
    """What an update makes of an fp32 gradient: its square, then in its place the update, from a row and a column
    factor where it has them (Adafactor.step, _approx_sq_grad)."""
    full, sizes = 4 * prod(shape), factors(shape)
    local.bind("update", full, beside=full)
    local.bind("update", full, beside=4 * sum(sizes) if len(sizes) == 2 else 0)
