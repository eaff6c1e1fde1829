"""Covering designs: few combinations in which every pair of values meets."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product

Row = tuple[str, ...]
Possible = Callable[[dict[int, str]], bool]
"""Whether a partly chosen row (dimension number -> value) may be completed."""
Pair = tuple[tuple[int, str], tuple[int, str]]


def covering_rows(values: Sequence[Sequence[str]], possible: Possible) -> Iterator[Row]:
    """Rows, one value of each dimension, in which every possible pair of values appears; greedy, always the same."""
    missing = dict.fromkeys(pairs(values, possible))
    while missing:
        row = _completed(dict(next(iter(missing))), values, possible, missing)
        done = tuple(row[at] for at in range(len(values)))
        for pair in pairs_of(done):
            missing.pop(pair, None)
        yield done


def random_rows(values: Sequence[Sequence[str]], possible: Possible, *, seed: int) -> Iterator[Row]:
    """Possible rows without end, drawn evenly."""
    draw = random.Random(seed)
    while True:
        row = tuple(draw.choice(choices) for choices in values)
        if possible(dict(enumerate(row))):
            yield row


def pairs_of(row: Row) -> Iterator[Pair]:
    """The pairs of values that meet in a row."""
    return combinations(enumerate(row), 2)


def pairs(values: Sequence[Sequence[str]], possible: Possible) -> Iterator[Pair]:
    """Every pair of values of two dimensions that may meet."""
    for (i, left), (j, right) in combinations(enumerate(values), 2):
        for a, b in product(left, right):
            if possible({i: a, j: b}):
                yield (i, a), (j, b)


def _completed(
    row: dict[int, str], values: Sequence[Sequence[str]], possible: Possible, missing: dict[Pair, None]
) -> dict[int, str]:
    """`row` with every dimension chosen: each time the value that meets most pairs not met yet."""
    for at, choices in enumerate(values):
        if at in row:
            continue
        open_to = [value for value in choices if possible({**row, at: value})]
        row[at] = max(open_to, key=lambda value: sum(_pair(at, value, *other) in missing for other in row.items()))
    return row


def _pair(i: int, a: str, j: int, b: str) -> Pair:
    return ((i, a), (j, b)) if i < j else ((j, b), (i, a))
