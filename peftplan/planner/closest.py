"""Where nothing fits or keeps to the limits: what misses least, by how much, and what would help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf

from peftplan.calibration import least_margin
from peftplan.errors import RequestError
from peftplan.planner import rank, says
from peftplan.planner.bench import Bench
from peftplan.planner.desk import Candidate, least_bytes
from peftplan.planner.explore import NO_LIMITS, by_size, first_fitting
from peftplan.planner.goal import Goal
from peftplan.planner.nearest import smallest_change
from peftplan.planner.result import Closest, Miss, Notch
from peftplan.result import Estimate


def closest(candidates: Sequence[Candidate], goal: Goal, bench: Bench) -> Closest:
    """What misses least: of those that fit, the least beyond the limits; where none fits, the fewest bytes."""
    tokens = candidates[0].space.job.tokens
    order = rank.ranked((c for c in candidates if c.may_fit), goal.order)
    order.sort(key=lambda c: rank.excess(c, goal, tokens))
    fitting = next(filter(bench.fits, order), None)
    if fitting is not None:
        return Closest(entry=bench.entry(fitting), misses=tuple(_beyond(fitting, goal, tokens)), helps=())
    nearest = _fewest_bytes(candidates, goal, bench)
    missing = Miss(
        what="memory",
        by=_missing_bytes(bench.device_bytes(nearest) or 0, nearest, _margin(nearest, bench)),
        unit="bytes",
        says=_too_much(nearest, bench),
    )
    return Closest(entry=bench.entry(nearest), misses=(missing,), helps=tuple(_helps(nearest, goal, bench)))


def _missing_bytes(device_bytes: int, c: Candidate, margin: float) -> int:
    """What the card lacks for the verdict `fits`."""
    return int(device_bytes * (1 + margin)) - (c.usable_bytes or 0)


def _margin(c: Candidate, bench: Bench) -> float:
    return bench.estimate(c).fit.margin or 0.0


def _fewest_bytes(candidates: Sequence[Candidate], goal: Goal, bench: Bench) -> Candidate:
    """The candidate that lacks least; a replay is asked for only while its lower bound could still win."""
    known = [c for c in candidates if c.usable_bytes is not None]
    lower = {c: _missing_bytes(least_bytes(c.figures.peak_bytes, c.seat.gpu), c, least_margin()) for c in known}
    best: Candidate | None = None
    lacks = inf
    for c in sorted(rank.ranked(known, goal.order), key=lower.__getitem__):
        if lower[c] >= lacks:
            break
        device_bytes = bench.device_bytes(c)
        missing = inf if device_bytes is None else _missing_bytes(device_bytes, c, _margin(c, bench))
        if missing < lacks:
            best, lacks = c, missing
    if best is None:
        raise RequestError(_no_verdict(bench.estimate(candidates[0])))
    return best


def _no_verdict(found: Estimate) -> str:
    """Why a card is neither enough nor too small."""
    why = next(note.why for note in found.assumptions if note.what in ("memory.device_bytes", "fit"))
    return f"--gpu {found.job.gpu}: {why}"


def _too_much(c: Candidate, bench: Bench) -> str:
    needed, usable = bench.device_bytes(c) or 0, c.usable_bytes or 0
    if needed > usable:
        return f"needs {needed - usable:,} bytes more than the card has"
    margin = _margin(c, bench)
    return f"leaves {usable - needed:,} bytes, less than the {margin:.1%} of its need that `fits` asks for"


def _beyond(c: Candidate, goal: Goal, tokens: int | None) -> Iterator[Miss]:
    usd, hours, quality = rank.usd_total(c, tokens), rank.hours(c, tokens), c.quality.accuracy
    if goal.max_usd is not None and usd > goal.max_usd:
        yield _limit("--max-usd", usd, goal.max_usd, "usd")
    if goal.max_hours is not None and hours > goal.max_hours:
        yield _limit("--max-hours", hours, goal.max_hours, "hours")
    if goal.min_quality is not None and (quality is None or quality < goal.min_quality):
        by = None if quality is None else goal.min_quality - quality
        says_ = c.quality.why if quality is None else f"measured {quality:.3f}, --min-quality is {goal.min_quality:g}"
        yield Miss(what="--min-quality", by=by, unit="accuracy", says=says_)


def _limit(what: str, value: float, limit: float, unit: str) -> Miss:
    if value == float("inf"):
        return Miss(what=what, by=None, unit=unit, says="its price or speed is unknown")
    return Miss(what=what, by=value - limit, unit=unit, says=f"{value:,.2f} {unit}, {what} is {limit:g}")


def _helps(c: Candidate, goal: Goal, bench: Bench) -> Iterator[Notch]:
    """The smallest change to the configuration that fits on its card, and the smallest card that holds it as it is."""
    job = bench.estimate(c).job
    free = goal.model_copy(update={**NO_LIMITS, "min_seq_len": goal.min_seq_len, "global_batch": None, "aim": "best"})
    change = smallest_change(job, free)
    if change is not None:
        entry = Bench(job).entry(change)
        yield Notch(change=says.changes(entry.changes), entry=entry, says=says.buys(entry, bench.entry(c)))
    for _, card in by_size():
        held = first_fitting(job.model_copy(update={"gpu": card.name, "usd_per_hour": None}), free, bench)
        if held is not None:
            entry = bench.entry(held)
            yield Notch(change=f'--gpu "{card.name}"', entry=entry, says=says.buys(entry, bench.entry(c)))
            return
