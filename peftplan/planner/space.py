"""The candidates of a plan: what may be chosen, asked of the code that would have to model it.

A candidate is a shape (what is trained and how: everything one card sees), an optimizer and a seat (cards and layout).
The global batch is the same for all; a seat and a shape without a whole number of micro-batches in it are no
candidate. A value that `resolve` or the graph refuses leaves its axis; it enters by itself when they accept it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from peftplan import methods
from peftplan.assemble import build_graph
from peftplan.errors import RequestError, UnknownName
from peftplan.job import Assumption, Job
from peftplan.planner.goal import Goal
from peftplan.planner.seats import Seat, layouts, make_seats, named_gpus, notes
from peftplan.resolve import resolve
from peftplan.training_loop import own_optimizer

METHODS = ("lora", "qlora", "full")
"""Where neither the job nor the goal names one: what most people choose between."""
RANKS = (8, 16, 32, 64)
TARGETS = (None, "all-linear")
FORMATS = ("int8", "nf4")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
RECOMPUTE = ("none", "full")
ATTENTION = ("sdpa", "flash_attention_2")
KERNELS: tuple[str, ...] = ()
"""None is offered: whose kernels run is a trainer's to say, and not all can say all. What a job names is kept."""
OFFLOAD = ("activations",)
"""The host's memory is for jobs that do not fit: only a smallest change tries it."""
GLOBAL_BATCH = 8
"""The Trainer's default micro-batch, where the job says nothing about batches."""
MOST_SEQUENCES = 64
"""The largest micro-batch tried."""
SHORTEST = 256
"""Tokens: a smallest change does not cut sequences below it, unless --min-seq-len says so."""

EFFORT = {
    "micro_batch": 1, "recompute": 1, "attention": 1, "kernels": 1, "offload": 1, "model.use_cache": 1,
    "optimizer": 2, "format": 4, "rank": 4, "target_modules": 4, "seq_len": 8, "method": 16,
}  # fmt: skip
"""What a step away from the first choice of an axis weighs in `simplicity`: 1 where the mathematics stays the same,
more the more the result may differ. Our own scale; the sum of a configuration orders it, nothing else."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Fields to set, and the effort of setting them."""

    update: Mapping[str, Any]
    effort: int = 0


@dataclass(frozen=True, kw_only=True)
class Space:
    """Every candidate, in a fixed order."""

    job: Job
    global_batch: int
    accumulations: int | None
    """Micro-batches per step, where they are fixed."""
    shapes: tuple[Choice, ...]
    seats: tuple[Seat, ...]
    optimizers: tuple[Choice, ...]
    refused_cards: str | None = None
    """Why there are single cards only, where several were offered."""
    assumptions: tuple[Assumption, ...] = ()

    def grad_accum(self, shape: Choice, seat: Seat) -> int | None:
        """Micro-batches per step, or None where the global batch does not hold a whole number of them."""
        times, rest = divmod(self.global_batch, shape.update["micro_batch"] * seat.cards)
        return times if rest == 0 and self.accumulations in (None, times) else None

    def candidate(self, shape: Choice, seat: Seat, optimizer: Choice) -> Job:
        """The job of one candidate."""
        where = {"gpu": seat.gpu.name, "gpus": seat.gpus, "nodes": seat.nodes, "layout": seat.layout}
        times = {"grad_accum": self.grad_accum(shape, seat)}
        return changed(self.job, {**optimizer.update, **shape.update, **where, **times})


def changed(job: Job, update: Mapping[str, Any]) -> Job:
    """`job` with fields (and `model.*` settings) replaced; a replaced choice takes its own knobs with it."""
    dropped = tuple(f"{name}." for name in ("method", "format", "optimizer") if _replaces(job, update, name))
    settings = {key: value for key, value in job.settings.items() if not key.startswith(dropped)}
    settings.update((key, value) for key, value in update.items() if "." in key)
    plain = {key: value for key, value in update.items() if "." not in key}
    return job.model_copy(update={**plain, "settings": settings})


def _replaces(job: Job, update: Mapping[str, Any], name: str) -> bool:
    return name in update and update[name] != getattr(job, name)


# -- building it ------------------------------------------------------------------------------------------------


def make_space(job: Job, goal: Goal) -> Space:
    """The candidates that a job and a goal leave open. Raises RequestError where the job itself is wrong."""
    alone = {"gpus": 1, "nodes": 1, "layout": None} if job.gpus * job.nodes > 1 else {}
    base = job.model_copy(update={"gpu": None, **alone, **_length(job, goal)})
    free = _Changing(job, goal) if goal.aim == "smallest_change" else _Choosing(job, goal)
    shapes = [shape for method in free.methods() for shape in _shapes(base, method, free)]
    if not shapes:  # every method was refused: say why the first one was
        resolve(changed(base, free.methods()[0].update))
    cards, (shared, refused) = named_gpus(job.gpu), layouts(job)
    return Space(
        job=job,
        global_batch=_global_batch(job, goal),
        accumulations=job.grad_accum if goal.aim == "best" and _given(job, "grad_accum") else None,
        shapes=tuple(shapes),
        seats=make_seats(cards, shared),
        optimizers=_accepted(base, _axis("optimizer", free.values("optimizer", OPTIMIZERS))),
        refused_cards=refused,
        assumptions=tuple(notes(job, cards, refused)),
    )


def _length(job: Job, goal: Goal) -> dict[str, Any]:
    return {} if job.seq_len is not None or goal.min_seq_len is None else {"seq_len": goal.min_seq_len}


def _global_batch(job: Job, goal: Goal) -> int:
    if goal.global_batch is not None:
        return goal.global_batch
    if job.model_fields_set & {"micro_batch", "grad_accum"}:
        return job.micro_batch * job.grad_accum * job.gpus * job.nodes
    return GLOBAL_BATCH


def _given(job: Job, name: str) -> bool:
    return name in job.model_fields_set and getattr(job, name) is not None


@dataclass(frozen=True)
class _Choosing:
    """What the job gives is fixed; the rest takes the values of this file, the default first."""

    job: Job
    goal: Goal

    def methods(self) -> tuple[Choice, ...]:
        named = (self.job.method,) if _given(self.job, "method") else METHODS
        return _methods(self.job, self.goal.methods or named)

    def values(self, name: str, known: Sequence[Any]) -> tuple[Any, ...]:
        return (getattr(self.job, name),) if _given(self.job, name) else tuple(known)

    def spare(self, name: str, known: Sequence[Any]) -> tuple[Any, ...]:
        del known
        return (getattr(self.job, name),)

    def targets(self) -> tuple[Any, ...]:
        return self.values("target_modules", TARGETS)

    def ranks(self, resolved: Job) -> tuple[Any, ...]:
        floor = self.goal.min_rank or 1
        ladder = {*RANKS, *([self.goal.min_rank] if self.goal.min_rank else [resolved.rank])}
        return self.values("rank", sorted(rank for rank in ladder if rank is not None and rank >= floor))

    def lengths(self, resolved: Job) -> tuple[Any, ...]:
        return (resolved.seq_len,)

    def formats(self, resolved: Job) -> tuple[Any, ...]:
        packed = resolved.format in FORMATS
        return self.values("format", (None,) if packed else (None, *FORMATS))

    def caches(self) -> tuple[bool | None, ...]:
        return (None,)

    def micro_batches(self) -> tuple[int, ...]:
        if _given(self.job, "micro_batch"):
            return (self.job.micro_batch,)
        return _divisors(_global_batch(self.job, self.goal), near=self.job.micro_batch)


@dataclass(frozen=True)
class _Changing:
    """What the job has comes first, and on every axis what needs less comes after it."""

    job: Job
    goal: Goal

    def methods(self) -> tuple[Choice, ...]:
        instead = ("lora",) if methods.get(self.job.method).trains == "base" else ()
        return _methods(self.job, self.goal.methods or (self.job.method, *instead))

    def values(self, name: str, known: Sequence[Any]) -> tuple[Any, ...]:
        mine = getattr(self.job, name)
        return tuple(known) if mine is None else _from(mine, (value for value in known if value is not None))

    def spare(self, name: str, known: Sequence[Any]) -> tuple[Any, ...]:
        return self.values(name, (None, *known))

    def targets(self) -> tuple[Any, ...]:
        return (self.job.target_modules,)

    def ranks(self, resolved: Job) -> tuple[Any, ...]:
        return _halved(resolved.rank or RANKS[0], floor=self.goal.min_rank or 1, times=1)

    def lengths(self, resolved: Job) -> tuple[Any, ...]:
        return _halved(resolved.seq_len or SHORTEST, floor=self.goal.min_seq_len or SHORTEST, times=3)

    def formats(self, resolved: Job) -> tuple[Any, ...]:
        return (self.job.format,) if resolved.format in FORMATS else self.values("format", (None, *FORMATS))

    def caches(self) -> tuple[bool | None, ...]:
        return (None,) if "model.use_cache" in self.job.settings else (None, False)

    def micro_batches(self) -> tuple[int, ...]:
        found = _divisors(_global_batch(self.job, self.goal), near=self.job.micro_batch)
        return tuple(size for size in found if size <= self.job.micro_batch)


def _shapes(base: Job, method: Choice, free: _Choosing | _Changing) -> Iterator[Choice]:
    """Every shape of one method; nothing where the job's own fields rule the method out."""
    job = changed(base, method.update)
    try:
        resolved = resolve(job).job
    except UnknownName:
        raise
    except RequestError:
        return
    probed = (
        _axis("format", free.formats(resolved)),
        _axis("recompute", free.values("recompute", _from(resolved.recompute, RECOMPUTE))),
        _axis("attention", free.values("attention", ATTENTION)),
        _axis("kernels", free.spare("kernels", KERNELS)),
        _axis("offload", free.spare("offload", OFFLOAD)),
        _axis("model.use_cache", free.caches()),
    )
    axes = (
        (method,),
        _axis("rank", free.ranks(resolved) if resolved.rank is not None else (None,)),
        _axis("target_modules", free.targets() if resolved.target_modules is not None else (None,)),
        _axis("seq_len", free.lengths(resolved)),
        _axis("micro_batch", free.micro_batches()),
        *(_accepted(job, axis) for axis in probed),
    )
    yield from map(_together, product(*axes))


def _methods(job: Job, names: Iterable[str]) -> tuple[Choice, ...]:
    """The axis of methods; one whose name stands for an optimizer brings it along."""
    axis = _axis("method", names)
    owned = ((choice, own_optimizer(changed(job, choice.update))) for choice in axis)
    return tuple(
        Choice({**choice.update, "optimizer": own}, choice.effort) if own is not None else choice
        for choice, own in owned
    )


def _from(first: Any, values: Iterable[Any]) -> tuple[Any, ...]:
    return (first, *(value for value in values if value != first))


def _axis(name: str, values: Iterable[Any]) -> tuple[Choice, ...]:
    """One choice per value, the first without effort; None leaves the field to its default."""
    weight = EFFORT[name]
    return tuple(Choice({} if v is None and "." in name else {name: v}, weight * i) for i, v in enumerate(values))


def _together(choices: Iterable[Choice]) -> Choice:
    update: dict[str, Any] = {}
    effort = 0
    for choice in choices:
        update.update(choice.update)
        effort += choice.effort
    return Choice(update, effort)


def _accepted(job: Job, axis: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """The choices that the code models, asked one by one; where it refuses all, the first, so that it says why."""
    if len(axis) == 1:
        return axis
    return tuple(choice for choice in axis if _modelled(changed(job, choice.update))) or axis[:1]


def _modelled(job: Job) -> bool:
    try:
        build_graph(resolve(job))
    except RequestError:
        return False
    return True


def _divisors(whole: int, *, near: int) -> tuple[int, ...]:
    """The divisors of `whole` that a micro-batch may be, those nearest to `near` first."""
    small = (d for d in range(1, min(whole, max(near, MOST_SEQUENCES)) + 1) if whole % d == 0)
    return tuple(sorted(small, key=lambda d: (abs(math.log2(d / near)), d)))


def _halved(value: int, *, floor: int, times: int) -> tuple[int, ...]:
    halves = (value >> i for i in range(1, times + 1))
    return (value, *(half for half in halves if half >= floor))
