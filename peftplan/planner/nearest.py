"""The smallest change to a job that fits: candidates by effort, those that cannot fit left out in families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from math import inf

from peftplan.job import Job
from peftplan.planner import rank
from peftplan.planner.bench import Bench
from peftplan.planner.desk import Candidate, weigh
from peftplan.planner.goal import CHANGE_ORDER, Goal
from peftplan.planner.space import Choice, Space, make_space

SLACK = 2
"""Effort beyond the smallest change that is still looked at, for something to compare it with."""


def smallest_change(job: Job, goal: Goal) -> Candidate | None:
    """The candidate nearest to `job` that fits."""
    bench = Bench(job)
    space = near(make_space(job, goal.model_copy(update={"aim": "smallest_change"})), bench.fits)
    if space is None:
        return None
    return next(filter(bench.fits, rank.ranked(weigh(space).candidates, CHANGE_ORDER)))


def near(space: Space, good: Callable[[Candidate], bool]) -> Space | None:
    """The part of `space` as near to its job as the nearest good candidate, and SLACK beyond; None where none is good.

    Shapes are walked by effort until no other can be nearer.
    """
    best = inf
    for effort, shapes in groupby(sorted(hopeful(space), key=_effort), key=_effort):
        if effort > best:
            break
        found = sorted(weigh(replace(space, shapes=tuple(shapes))).candidates, key=lambda c: c.effort)
        best = min(best, next((c.effort for c in found if c.effort < best and good(c)), inf))
    shapes_near = tuple(shape for shape in space.shapes if shape.effort <= best + SLACK)
    return replace(space, shapes=shapes_near) if best < inf else None


def hopeful(space: Space) -> list[Choice]:
    """The shapes but for those ruled out by the smallest of their family, which cannot fit anywhere.

    More or longer sequences never lower the peak (tests/laws), all else equal: padding and kept gradients too.
    """
    families: dict[object, list[Choice]] = {}
    for shape in sorted(space.shapes, key=_size):
        families.setdefault(_family(space, shape), []).append(shape)
    smallest = tuple(members[0] for members in families.values())
    probed = weigh(replace(space, shapes=smallest)).candidates
    out = {c.place[0] for c in probed} - {c.place[0] for c in probed if c.may_fit}
    return [shape for i, members in enumerate(families.values()) if i not in out for shape in members]


def _family(space: Space, shape: Choice) -> object:
    """All but the lengths and the numbers of sequences, and what hangs on these."""
    rest = frozenset((name, str(value)) for name, value in shape.update.items() if name not in _SIZES)
    padded = space.job.batching is None and shape.update["micro_batch"] > 1
    times = (space.grad_accum(shape, seat) for seat in space.seats)
    return rest, padded, tuple(None if n is None else n > 1 for n in times)


_SIZES = ("seq_len", "micro_batch")


def _size(shape: Choice) -> tuple[int, int]:
    return shape.update["seq_len"], shape.update["micro_batch"]


def _effort(shape: Choice) -> int:
    return shape.effort
