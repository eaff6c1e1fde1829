"""Around the winner: the best of each kind, one notch more or less, how far it can grow; and what misses least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from math import inf

from peftplan.arch import load_arch
from peftplan.errors import RequestError
from peftplan.fit import MARGIN, verdict_of
from peftplan.hardware import Gpu, usable_bytes
from peftplan.hardware.find import find_gpu
from peftplan.job import Job
from peftplan.pipeline import estimate
from peftplan.planner import rank, says
from peftplan.planner.bench import Bench, changed_fields
from peftplan.planner.desk import Candidate, least_bytes, weigh
from peftplan.planner.goal import CHANGE_ORDER, Goal
from peftplan.planner.result import Closest, Miss, Notch, Room
from peftplan.planner.space import Choice, Space, make_space, named_gpus
from peftplan.result import Estimate

STEP = 128
"""Tokens: the largest sequence is found to this."""
MOST_SEQUENCES = 4096
"""The largest micro-batch looked for."""
SLACK = 2
"""Effort beyond the smallest change that is still looked at, for something to compare it with."""
CHOSEN = ("method", "rank", "target_modules", "format", "seq_len", "gpu", "gpus", "nodes")
"""What a notch keeps of the winner; how it is run is chosen anew."""


def best_of_each_kind(
    ordered: Iterable[Candidate], fits: Callable[[Candidate], bool], *, kind: Callable[[Candidate], object], most: int
) -> list[Candidate]:
    """The first that fits of each kind, in order, at most `most`."""
    found: dict[object, Candidate] = {}
    for c in ordered:
        if len(found) == most:
            break
        if kind(c) not in found and fits(c):
            found[kind(c)] = c
    return list(found.values())


def kind_of(goal: Goal) -> Callable[[Candidate], object]:
    """What rows of a ranking differ in: where and what is trained; or which fields of the start changed."""
    return changed_fields if goal.aim == "smallest_change" else _place_and_method


def _place_and_method(c: Candidate) -> object:
    seat, shape = c.seat, c.shape.update
    return seat.gpu.name, seat.gpus, seat.nodes, seat.layout, shape["method"], shape.get("format")


def first_fitting(job: Job, goal: Goal, bench: Bench) -> Candidate | None:
    """The winner of a search without limits of cost and time."""
    candidates = weigh(make_space(job, goal)).candidates
    return next(filter(bench.fits, rank.ranked(candidates, goal.order)), None)


# -- one notch --------------------------------------------------------------------------------------------------


def notches(winner: Candidate, goal: Goal, bench: Bench) -> Iterator[Notch]:
    """One more GPU, the next bigger card, half the sequence, half the rank: the best of each beside the winner."""
    job = bench.estimate(winner).job
    free = goal.model_copy(update={**_NO_LIMITS, "global_batch": winner.space.global_batch, "aim": "best"})
    cards = winner.seat.cards + 1
    yield _notch(f"--gpus {cards}", {"gpus": cards, "nodes": 1}, winner, free, bench)
    bigger = next_bigger(winner.seat.gpu)
    if bigger is not None:
        yield _notch(f'--gpu "{bigger.name}"', {"gpu": bigger.name, "usd_per_hour": None}, winner, free, bench)
    half = (job.seq_len or 0) // 2
    if half >= (goal.min_seq_len or 1):
        yield _notch(f"--seq-len {half}", {"seq_len": half}, winner, free, bench)
    lower = (job.rank or 0) // 2
    if lower >= (goal.min_rank or 1):
        yield _notch(f"--rank {lower}", {"rank": lower}, winner, free, bench)


_NO_LIMITS = {
    "methods": None, "objectives": None, "max_usd": None, "max_hours": None, "min_quality": None, "min_rank": None,
    "min_seq_len": None,
}  # fmt: skip


def _notch(change: str, update: dict[str, object], winner: Candidate, goal: Goal, bench: Bench) -> Notch:
    job = _pinned(winner, bench.estimate(winner).job, update)
    try:
        space = make_space(job, goal)
    except RequestError as error:
        return Notch(change=change, entry=None, says=str(error))
    if space.refused_cards is not None:
        return Notch(change=change, entry=None, says=space.refused_cards)
    found = next(filter(bench.fits, rank.ranked(weigh(space).candidates, goal.order)), None)
    if found is None:
        return Notch(change=change, entry=None, says="no configuration fits")
    entry = bench.entry(found)
    return Notch(change=change, entry=entry, says=says.buys(entry, bench.entry(winner)))


def _pinned(winner: Candidate, resolved: Job, update: dict[str, object]) -> Job:
    """The asked job with what the winner chose to train, and where; everything else as open as it was."""
    names = {*winner.space.job.model_fields_set, *CHOSEN} - {"grad_accum"}
    fields = {name: getattr(resolved, name) for name in names} | update
    return Job(**{name: value for name, value in fields.items() if value is not None})


def next_bigger(gpu: Gpu) -> Gpu | None:
    """The smallest common card with a price that is sold with more memory."""
    return next((card for _, card in _by_size() if card.memory.marketed_bytes > gpu.memory.marketed_bytes), None)


def _by_size() -> list[tuple[int, Gpu]]:
    sizes = ((usable_bytes(card).bytes, card) for card in named_gpus(None))
    return sorted(((size, card) for size, card in sizes if size is not None), key=lambda pair: pair[0])


# -- how far it can grow ----------------------------------------------------------------------------------------


def room(job: Job) -> Room:
    """The largest micro-batch and the longest sequence with the verdict `fits`, each by itself."""
    length = job.seq_len or 1
    longest = load_arch(job.model, config=job.config).max_positions or length
    batches = _largest(lambda n: job.model_copy(update={"micro_batch": job.micro_batch + n}), MOST_SEQUENCES)
    lengths = _largest(
        lambda n: job.model_copy(update={"seq_len": length + STEP * n}), max(longest - length, 0) // STEP
    )
    return Room(micro_batch=job.micro_batch + batches, seq_len=length + STEP * lengths, seq_len_step=STEP)


def _largest(grown: Callable[[int], Job], most: int) -> int:
    """An n up to `most` with which the job fits and with n + 1 does not; 0 is known to fit.

    Bytes grow with n but for the allocator's fragments. Where the peak alone is too much needs no replay.
    """
    low, high = 0, 1
    while high <= most and _may_fit(grown(high)):
        high *= 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(grown(middle)) else (low, middle)
    return low


def _may_fit(job: Job) -> bool:
    gpu = find_gpu(str(job.gpu))
    usable = usable_bytes(gpu).bytes or 0
    return verdict_of(least_bytes(estimate(job).memory.peak_bytes, gpu), usable) == "fits"


def _fits(job: Job) -> bool:
    return _may_fit(job) and estimate(job).fit.verdict == "fits"


# -- when nothing fits ------------------------------------------------------------------------------------------


def closest(candidates: list[Candidate], goal: Goal, bench: Bench) -> Closest:
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
        by=_missing_bytes(bench.device_bytes(nearest) or 0, nearest),
        unit="bytes",
        says=_too_much(nearest, bench),
    )
    return Closest(entry=bench.entry(nearest), misses=(missing,), helps=tuple(_helps(nearest, goal, bench)))


def _missing_bytes(device_bytes: int, c: Candidate) -> int:
    """What the card lacks for the verdict `fits`."""
    return int(device_bytes * (1 + MARGIN)) - (c.usable_bytes or 0)


def _fewest_bytes(candidates: list[Candidate], goal: Goal, bench: Bench) -> Candidate:
    """The candidate that lacks least; a replay is asked for only while its lower bound could still win."""
    known = [c for c in candidates if c.usable_bytes is not None]
    lower = {c: _missing_bytes(least_bytes(c.figures.peak_bytes, c.seat.gpu), c) for c in known}
    best: Candidate | None = None
    lacks = inf
    for c in sorted(rank.ranked(known, goal.order), key=lower.__getitem__):
        if lower[c] >= lacks:
            break
        device_bytes = bench.device_bytes(c)
        if device_bytes is not None and _missing_bytes(device_bytes, c) < lacks:
            best, lacks = c, _missing_bytes(device_bytes, c)
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
    return f"leaves {usable - needed:,} bytes, less than the {MARGIN:.0%} of its need that `fits` asks for"


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
    free = goal.model_copy(update={**_NO_LIMITS, "min_seq_len": goal.min_seq_len, "global_batch": None, "aim": "best"})
    change = smallest_change(job, free)
    if change is not None:
        entry = Bench(job).entry(change)
        yield Notch(change=says.changes(entry.changes), entry=entry, says=says.buys(entry, bench.entry(c)))
    for _, card in _by_size():
        held = first_fitting(job.model_copy(update={"gpu": card.name, "usd_per_hour": None}), free, bench)
        if held is not None:
            entry = bench.entry(held)
            yield Notch(change=f'--gpu "{card.name}"', entry=entry, says=says.buys(entry, bench.entry(c)))
            return


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
