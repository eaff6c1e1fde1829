"""The order of candidates, what separates two of them, and the Pareto front.

Smaller is better in every value here. What is unknown comes after all that is known: no price, no speed and no
measured quality are reasons to prefer another, never reasons to win.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf
from operator import le

from peftplan.cost import run_hours, usd_per_million
from peftplan.planner.desk import Candidate
from peftplan.planner.goal import Goal, Objective
from peftplan.units import GIB

Values = tuple[float, ...]


def _cost(c: Candidate) -> float:
    """Dollars per million tokens."""
    price, speed = c.figures.usd_per_hour, c.figures.tokens_per_second
    return inf if price is None or not speed else shown(usd_per_million(price, speed))


def _time(c: Candidate) -> float:
    """Seconds per token."""
    speed = c.figures.tokens_per_second
    return inf if not speed else shown(1 / speed)


def _quality(c: Candidate) -> float:
    return inf if c.quality.accuracy is None else -c.quality.accuracy


def _headroom(c: Candidate) -> float:
    """GiB that the peak lacks of the card, below zero: what is known of the spare room without a replay."""
    return inf if c.usable_bytes is None else round((c.figures.peak_bytes - c.usable_bytes) / GIB, 2)


def shown(value: float) -> float:
    """To three digits: a difference that no report shows decides nothing, and the next objective is asked."""
    return float(f"{value:.3g}")


def _simplicity(c: Candidate) -> float:
    return c.effort


OBJECTIVES: dict[Objective, Callable[[Candidate], float]] = {
    "cost": _cost,
    "time": _time,
    "quality": _quality,
    "headroom": _headroom,
    "simplicity": _simplicity,
}
FRONT: tuple[Objective, ...] = ("cost", "time", "headroom", "quality")
"""The axes of the Pareto front."""


def values(c: Candidate, order: Iterable[Objective]) -> Values:
    """The objectives of one candidate in the order they are compared."""
    return tuple(OBJECTIVES[name](c) for name in order)


def ranked(candidates: Iterable[Candidate], order: Sequence[Objective]) -> list[Candidate]:
    """Best first. Ties on all objectives: the fewest and least changes, then the place in the space."""
    return sorted(candidates, key=lambda c: (*values(c, order), c.effort, c.place))


def decided_by(loser: Candidate, winner: Candidate, order: Iterable[Objective]) -> Objective | None:
    """The objective that put `winner` first; None where all are equal."""
    return next((name for name in order if OBJECTIVES[name](loser) > OBJECTIVES[name](winner)), None)


def front(candidates: Sequence[Candidate], fits: Callable[[Candidate], bool]) -> list[Candidate]:
    """The fitting candidates that no other fitting one equals or beats on every axis, in order of the axes.

    `candidates` are best first: of equals the first stays. Whoever beats a candidate comes before it in the order of
    the axes, so one pass is enough and `fits` is asked only of those that nothing on the front beats.
    """
    found: list[tuple[Values, Candidate]] = []
    for own, c in sorted(((values(c, FRONT), c) for c in candidates), key=lambda pair: pair[0]):
        if not any(all(map(le, known, own)) for known, _ in reversed(found)) and fits(c):
            found.append((own, c))
    return [c for _, c in found]


def within(c: Candidate, goal: Goal, tokens: int | None) -> bool:
    """Whether a candidate keeps to every limit but memory."""
    return excess(c, goal, tokens) <= 0


def excess(c: Candidate, goal: Goal, tokens: int | None) -> float:
    """By what share the limit it misses most is missed: 0.1 is a tenth too much; 0 or less keeps all of them."""
    return max((share for _, share in misses(c, goal, tokens)), default=-inf)


def misses(c: Candidate, goal: Goal, tokens: int | None) -> list[tuple[str, float]]:
    """Each limit with the share it is exceeded by; infinite where the value is unknown."""
    found = []
    if goal.max_usd is not None:
        found.append(("max_usd", usd_total(c, tokens) / goal.max_usd - 1))
    if goal.max_hours is not None:
        found.append(("max_hours", hours(c, tokens) / goal.max_hours - 1))
    if goal.min_quality is not None:
        quality = c.quality.accuracy
        found.append(("min_quality", inf if quality is None else goal.min_quality - quality))
    return found


def usd_total(c: Candidate, tokens: int | None) -> float:
    """Dollars for the whole run; infinite where unknown."""
    price = c.figures.usd_per_hour
    return inf if price is None else price * hours(c, tokens)


def hours(c: Candidate, tokens: int | None) -> float:
    """Hours for the whole run; infinite where unknown."""
    speed = c.figures.tokens_per_second
    return inf if tokens is None or not speed else run_hours(tokens, speed)
