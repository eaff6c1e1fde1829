"""Weighing candidates: peak, speed and price of each, without doing twice what several of them share.

What is trained and how decides the graph and the walk over it. The optimizer adds a constant to what lives between
steps and one more moment at the end of the step; the card adds library workspaces, a clock and a price. So a shape is
walked once for all cards that build the same graph, its clock runs once per card, and the rest is arithmetic. Every
figure is the one that `estimate` states of the candidate, to the last bit. Several cards are not taken apart: there,
each candidate is one whole `read`.

The verdict is not among the figures: it replays the allocator. But what is allocated is reserved too, so peak and CUDA
context are the least that a card must hold, and that rules most of what does not fit out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, product
from typing import NamedTuple

from peftplan import optimizers
from peftplan.assemble import state_bytes, step_bytes
from peftplan.calibration import least_margin
from peftplan.cost import price
from peftplan.errors import RequestError
from peftplan.graph.blocks.attention import kernel_class
from peftplan.hardware import Gpu, usable_bytes
from peftplan.hardware.overheads import cuda_context, workspace_bytes
from peftplan.job import Job
from peftplan.optimizers.base import Optimizer
from peftplan.pace import metered_case, pace_of, tokens_per_second, traffic
from peftplan.pipeline import Walked, among, read, walk
from peftplan.planner.quality import Evidence, evidence
from peftplan.planner.seats import Seat
from peftplan.planner.space import Choice, Space, changed
from peftplan.resolve import resolve
from peftplan.result import Flops, Time
from peftplan.standing import has_biased_linears
from peftplan.step.clock import Meter, OptimizerTraffic
from peftplan.step.work import Pass, passes


class Figures(NamedTuple):
    """What is known of a candidate before any verdict."""

    peak_bytes: int
    tokens_per_second: float | None
    usd_per_hour: float | None
    """Of all its cards."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """One candidate. Speed is not asked for (None) where it cannot fit."""

    place: tuple[int, int, int]
    """Of its shape, seat and optimizer in the space: the last tie-break."""
    space: Space
    shape: Choice
    seat: Seat
    optimizer: Choice
    figures: Figures
    usable_bytes: int | None
    may_fit: bool
    """Whether a replay could find that it fits; False is certain."""
    quality: Evidence

    @property
    def job(self) -> Job:
        return self.space.candidate(self.shape, self.seat, self.optimizer)

    @property
    def effort(self) -> int:
        return self.shape.effort + self.seat.effort + self.optimizer.effort


@dataclass(slots=True)
class Weighed:
    """Every candidate of a space that the code models, and how many it refused, by the reason."""

    candidates: list[Candidate] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


def weigh(space: Space) -> Weighed:
    """All candidates of `space`."""
    desk, found = _Desk(space), Weighed()
    for number, shape in enumerate(space.shapes):
        for seats in _alike(space, shape):
            _weigh(desk, number, seats, found)
    return found


def _weigh(desk: _Desk, shape: int, seats: Sequence[int], found: Weighed) -> None:
    try:
        found.candidates += desk.weigh(shape, seats)
    except RequestError as error:
        found.refused[str(error)] += desk.count(seats)


def least_bytes(peak_bytes: int, gpu: Gpu) -> int:
    """No run with this peak takes less of the card."""
    return peak_bytes + cuda_context(gpu.capability).bytes


def _alike(space: Space, shape: Choice) -> Iterator[list[int]]:
    """The places of seats that see the same graph: equal numbers of cards of one kernel class in one layout."""
    attention = str(shape.update.get("attention"))

    def kind(place: int) -> tuple[int, int, str, tuple[bool, bool]]:
        seat = space.seats[place]
        return seat.gpus, seat.nodes, seat.layout or "", kernel_class(seat.gpu.capability, attention)

    possible = (i for i, seat in enumerate(space.seats) if space.grad_accum(shape, seat) is not None)
    for _, same in groupby(sorted(possible, key=kind), key=kind):
        yield list(same)


class _Desk:
    """One space's optimizers and cards, looked up once."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._usable = {seat.gpu.name: usable_bytes(seat.gpu).bytes for seat in space.seats}
        self._hourly = {seat.gpu.name: _usd_per_hour(space.job, seat.gpu) for seat in space.seats}
        self._optimizers = [_optimizer(space.job, choice) for choice in space.optimizers]

    def count(self, seats: Sequence[int]) -> int:
        """How many candidates a shape has on these seats."""
        return len(seats) * len(self._optimizers)

    def weigh(self, shape: int, seats: Sequence[int]) -> list[Candidate]:
        """The candidates of one shape on seats that are alike; RequestError where they are not modelled."""
        made = self._space.shapes[shape]
        choices = self._space.optimizers[:1] if "optimizer" in made.update else self._space.optimizers
        apart = self._in_backward(made)
        known = (self._whole if apart else self._shared)(made, [self._space.seats[i] for i in seats], choices)
        places = ((shape, seat, choice) for seat in seats for choice in range(len(choices)))
        return [self._candidate(place, *one) for place, one in zip(places, known, strict=True)]

    def _in_backward(self, shape: Choice) -> bool:
        """Whether an optimizer is part of the walk."""
        own = [_optimizer(self._space.job, shape)] if "optimizer" in shape.update else self._optimizers
        return any(optimizer.frees_gradients for optimizer in own)

    def _candidate(self, place: tuple[int, int, int], figures: Figures, quality: Evidence) -> Candidate:
        shape, seat, optimizer = place
        gpu = self._space.seats[seat].gpu
        return Candidate(
            place=place,
            space=self._space,
            shape=self._space.shapes[shape],
            seat=self._space.seats[seat],
            optimizer=self._space.optimizers[optimizer],
            figures=figures,
            usable_bytes=self._usable[gpu.name],
            may_fit=_may_fit(figures.peak_bytes, gpu, self._usable[gpu.name]),
            quality=quality,
        )

    def _shared(
        self, shape: Choice, seats: Sequence[Seat], choices: Sequence[Choice]
    ) -> Iterator[tuple[Figures, Evidence]]:
        """One walk for all cards and optimizers."""
        case = resolve(self._space.candidate(shape, seats[0], choices[0]))
        if case.method.stages(case.arch) != (case.method,):  # which one is the worst may depend on the optimizer
            yield from self._whole(shape, seats, choices)
            return
        own = [case.optimizer] if "optimizer" in shape.update else self._optimizers
        one = _OneCard(walk(case), own)
        qualities = [evidence(case, optimizer) for optimizer in own]
        for seat in seats:
            hourly = self._hourly[seat.gpu.name]
            every = None if hourly is None else seat.cards * hourly
            known = one.figures(seat.gpu, self._usable[seat.gpu.name], every)
            yield from zip(known, qualities, strict=True)

    def _whole(
        self, shape: Choice, seats: Sequence[Seat], choices: Sequence[Choice]
    ) -> Iterator[tuple[Figures, Evidence]]:
        """One whole estimate for each."""
        for seat, choice in product(seats, choices):
            reading = read(self._space.candidate(shape, seat, choice))
            found = reading.estimate
            figures = Figures(found.memory.peak_bytes, found.time.tokens_per_second, found.cost.usd_per_hour)
            yield figures, evidence(reading.case, reading.case.optimizer)


class _OneCard:
    """A walked step, ready for any optimizer and any card that sees the same graph."""

    def __init__(self, walked: Walked, optimizers: Sequence[Optimizer]) -> None:
        self._walked = walked
        self._optimizers = [_Optimizer.of(walked, optimizer) for optimizer in optimizers]
        static = sum(walked.static.values())
        self._between_bytes = static - walked.static["state"] - walked.static["workspace"]
        self._step_bytes = max(p.bytes for p in walked.step.phases.values() if p.phase != "optimizer") - static
        self._end_bytes = walked.step.end_bytes - static
        self._biased = has_biased_linears(walked.graph)

    def figures(self, gpu: Gpu, usable: int | None, usd_per_hour: float | None) -> Iterator[Figures]:
        """One for each optimizer."""
        peaks = [self._peak_bytes(gpu, optimizer) for optimizer in self._optimizers]
        fitting = any(_may_fit(peak, gpu, usable) for peak in peaks)
        meter = metered_case(self._walked.case, self._runs, gpu) if fitting else None
        for peak, optimizer in zip(peaks, self._optimizers, strict=True):
            if isinstance(meter, Meter) and _may_fit(peak, gpu, usable):
                yield Figures(peak, self._speed(meter, optimizer, gpu), usd_per_hour)
            else:
                yield Figures(peak, None, usd_per_hour)

    @cached_property
    def _runs(self) -> list[Pass]:
        """For any card: what its cache may spare makes `low` lower, not the expected time."""
        return passes(self._walked.step.segments, forwards=self._walked.case.method.forwards)

    def _peak_bytes(self, gpu: Gpu, optimizer: _Optimizer) -> int:
        workspace = workspace_bytes(
            gpu.capability, biased_linears=self._biased, recomputes=self._walked.case.recompute.layers
        )
        between = self._between_bytes + workspace + optimizer.state_bytes
        return between + max(self._step_bytes, self._end_bytes + optimizer.step_bytes)

    def _speed(self, meter: Meter, optimizer: _Optimizer, gpu: Gpu) -> float | None:
        case = self._walked.case
        found = meter.total(optimizer.traffic, case.job.grad_accum)
        if case.layout.alone:
            return tokens_per_second(case.setup.batch, found, micro_batches=case.job.grad_accum)
        return pace_of(case, found, NO_FLOPS, gpu, among(self._walked)).time.tokens_per_second


class _Optimizer(NamedTuple):
    """What an optimizer is to one walk: held between steps, needed for the moment of its step, moved by it."""

    state_bytes: int
    step_bytes: int
    traffic: OptimizerTraffic

    @staticmethod
    def of(walked: Walked, optimizer: Optimizer) -> _Optimizer:
        train, size, loop = walked.trainees, walked.rules.size, walked.case.loop
        state = state_bytes(optimizer, train, size)
        step = step_bytes(optimizer, train, size, clips=loop.clips)
        return _Optimizer(state, step, traffic(optimizer, train.weights, state))


def _may_fit(peak_bytes: int, gpu: Gpu, usable: int | None) -> bool:
    return usable is not None and least_bytes(peak_bytes, gpu) * (1 + least_margin()) <= usable


def _optimizer(job: Job, choice: Choice) -> Optimizer:
    with_it = changed(job, choice.update)
    assert with_it.optimizer is not None, "a space names its optimizers"
    return optimizers.make(with_it.optimizer, with_it.knobs("optimizer"))


def _usd_per_hour(job: Job, gpu: Gpu) -> float | None:
    """Of one card."""
    alone = job.model_copy(update={"gpus": 1, "nodes": 1})
    return price(alone, NO_TIME, gpu).cost.usd_per_hour


NO_FLOPS = Flops(forward=0, backward=0, recompute=0, optimizer=0, total=0)
NO_TIME = Time(step_seconds=None, tokens_per_second=None, mfu=None, breakdown=None)
