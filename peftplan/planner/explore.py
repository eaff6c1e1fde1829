"""Around the winner: the best of each kind, one notch more or less, and how far it can grow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from peftplan.arch import load_arch
from peftplan.calibration import least_margin
from peftplan.errors import RequestError
from peftplan.hardware import Gpu, usable_bytes
from peftplan.hardware.find import find_gpu
from peftplan.job import Job
from peftplan.pipeline import estimate
from peftplan.planner import rank, says
from peftplan.planner.bench import Bench, changed_fields
from peftplan.planner.desk import Candidate, least_bytes, weigh
from peftplan.planner.goal import Goal
from peftplan.planner.result import Notch, Room
from peftplan.planner.seats import named_gpus
from peftplan.planner.space import make_space
from peftplan.result import Estimate

STEP = 128
"""Tokens: the largest sequence is found to this."""
MOST_SEQUENCES = 4096
"""The largest micro-batch looked for."""
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
    free = goal.model_copy(update={**NO_LIMITS, "global_batch": winner.space.global_batch, "aim": "best"})
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


NO_LIMITS = {
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
    return next((card for _, card in by_size() if card.memory.marketed_bytes > gpu.memory.marketed_bytes), None)


def by_size() -> list[tuple[int, Gpu]]:
    """The common cards with a price and the bytes a process can use of each, smallest first."""
    sizes = ((usable_bytes(card).bytes, card) for card in named_gpus(None))
    return sorted(((size, card) for size, card in sizes if size is not None), key=lambda pair: pair[0])


# -- how far it can grow ----------------------------------------------------------------------------------------


def room(found: Estimate) -> Room:
    """The largest micro-batch and the longest sequence with the verdict `fits`, each by itself."""
    job, length = found.job, found.job.seq_len or 1
    longest = load_arch(job.model, config=job.config).max_positions or length
    batches = _largest(
        lambda n: job.model_copy(update={"micro_batch": job.micro_batch + n}), most=MOST_SEQUENCES, start=found
    )
    lengths = _largest(
        lambda n: job.model_copy(update={"seq_len": length + STEP * n}),
        most=max(longest - length, 0) // STEP,
        start=found,
    )
    return Room(micro_batch=job.micro_batch + batches, seq_len=length + STEP * lengths, seq_len_step=STEP)


def _largest(grown: Callable[[int], Job], *, most: int, start: Estimate) -> int:
    """An n up to `most` with which the job fits and with n + 1 does not; `start`, with 0, is known to fit.

    Bytes grow with n but for the allocator's fragments. Where the peak alone is too much needs no replay; between, the
    first replays are near where the card would be full if the allocator held as much beyond the peak as at the start.
    """
    high = 1
    while high <= most and _may_fit(grown(high)):
        high *= 2
    bracket = _Bracket(low=0, high=min(high, most + 1))
    guess = _guess(grown, bracket, start)
    for n in (guess, guess + 1, guess - 1):
        bracket = bracket.after(n, grown)
    while bracket.high - bracket.low > 1:
        bracket = bracket.after((bracket.low + bracket.high) // 2, grown)
    return bracket.low


class _Bracket(NamedTuple):
    """`low` fits and `high` does not."""

    low: int
    high: int

    def after(self, n: int, grown: Callable[[int], Job]) -> _Bracket:
        """Narrower by the verdict with `n`, if that is between."""
        if not self.low < n < self.high:
            return self
        return self._replace(low=n) if _fits(grown(n)) else self._replace(high=n)


def _guess(grown: Callable[[int], Job], bracket: _Bracket, start: Estimate) -> int:
    """Where `fits` might end: the peak grows evenly, and reserved bytes with it."""
    memory, usable = start.memory, start.fit.usable_bytes or 0
    per_peak = (memory.device_bytes or memory.peak_bytes) / memory.peak_bytes
    growth = (estimate(grown(bracket.high)).memory.peak_bytes - memory.peak_bytes) / bracket.high
    return int((usable / (1 + (start.fit.margin or 0.0)) / per_peak - memory.peak_bytes) / growth) if growth > 0 else 0


def _may_fit(job: Job) -> bool:
    gpu = find_gpu(str(job.gpu))
    usable = usable_bytes(gpu).bytes or 0
    return least_bytes(estimate(job).memory.peak_bytes, gpu) * (1 + least_margin()) <= usable


def _fits(job: Job) -> bool:
    return _may_fit(job) and estimate(job).fit.verdict == "fits"
