"""Where a step tells a layout's schedule how far it is, and the schedule's allocations become the step's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from peftplan.graph.core import Region
from peftplan.layouts.units import UNSHARDED_GRADIENTS, Schedule, Unit, Whole
from peftplan.step.segments import Segment
from peftplan.step.walk import Account

Place = tuple[str, int | None]
"""A region's name and the index of its first layer."""
KEPT, ACCUMULATED = "@@reduce/kept gradients", "@@accumulated gradients"
HELD = "input and its gradient"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a case's weights are spread, for walks of its step. `units` names the unit of each region that is not the
    root's; `accumulated` says that whole gradients of micro-batches before are there."""

    schedule: Callable[[], Schedule]
    units: Mapping[Place, Unit]
    root: Unit
    accumulated: bool = False
    hooks_reruns: bool = False
    """Whether layers that a reentrant checkpoint runs again are hooked onto only then (see the style of that name)."""

    def unit_of(self, region: Region) -> Unit | None:
        return self.units.get((region.name, region.first_index))


class Book:
    """A schedule's ledger over the account of whatever runs at the moment."""

    def __init__(self, account: Account, size: Callable[[int], int]) -> None:
        self.account = account
        self.size = size

    def alloc(self, size: int, where: str, key: str) -> None:
        self.account.alloc(self.size(size), where, key)

    def free(self, size: int, key: str) -> None:
        self.account.free(self.size(size), key)

    def drop(self, gradients: Whole) -> None:
        for size, key in gradients:
            self.account.free(size, key)
            self.account.grad_bytes -= size

    def keep(self, sizes: Sequence[int]) -> None:
        for size in sizes:
            self.account.alloc(self.size(size), "reduce_scatter", KEPT)
            self.account.grad_bytes += self.size(size)


class Conductor:
    """One pass over the segments of a step, with the schedule told at every turn."""

    def __init__(self, sharding: Sharding, size: Callable[[int], int]) -> None:
        self._sharding, self._size = sharding, size
        self._schedule = sharding.schedule()
        self._root_gradient_bytes = sum(size(p.numel * p.gathered.size) for p in sharding.root.pieces if p.trainable)
        self._root_gradient_bytes *= sharding.accumulated
        self._held_bytes = 0

    def around_forward(self, part: Segment, run: Callable[[], T]) -> T:
        unit = self._sharding.unit_of(part.region)
        if unit is None:
            return run()
        book = Book(part.walk.account, self._size)
        self._schedule.enter(unit, book)
        done = run()
        self._schedule.leave(unit, book)
        return done

    def around_backward(self, part: Segment, before: Segment | None, *, root: bool) -> None:
        """A region's backward; `root` as in RegionWalk.backward."""
        walk, unit = part.walk, self._sharding.unit_of(part.region)
        if part.region.exit.name not in walk.need:
            walk.backward(root=root)
            return
        book = Book(walk.account, self._size)
        self._schedule.times = part.count
        if unit is not None:
            previous = part if part.count > 1 else before
            ahead = None if previous is None or self._rerun(previous) else self._sharding.unit_of(previous.region)
            self._schedule.enter_backward(unit, ahead, book)
        holds = unit is not None and self._holds_input(part, unit)
        walk.backward(root=root or holds)
        own = [g for g in walk.gradients.of_params if g not in walk.gradients.of_model] if unit is not None else []
        self._root_gradient_bytes += sum(g.bytes for g in walk.gradients.of_params if g not in own)
        if unit is not None:
            entry = part.region.entry
            late = entry is None or entry.name not in walk.need
            whole = self._accumulated(unit) if self._sharding.accumulated else [(g.bytes, g.key) for g in own]
            if late and whole:
                whole = [(sum(size for size, _ in whole), UNSHARDED_GRADIENTS)]
            self._schedule.leave_backward(unit, whole, book, late=late)
        if holds:
            size = self._size(part.region.exit.nbytes)
            walk.account.alloc(size, part.region.name, HELD)
            self._held_bytes += 2 * size * part.count

    def _holds_input(self, part: Segment, unit: Unit) -> bool:
        """Whether this layer's input stays with its gradient, which is that of the exit of the layer before."""
        return self._rerun(part) and part.region.entry is not None and any(not p.trainable for p in unit.pieces)

    def _rerun(self, part: Segment) -> bool:
        """Whether it is hooked onto in backward only."""
        return self._sharding.hooks_reruns and part.checkpointed and part.walk.reentrant

    def _accumulated(self, unit: Unit) -> Whole:
        return [(self._size(p.numel * p.gathered.size), ACCUMULATED) for p in unit.pieces if p.trainable]

    def begin(self, account: Account) -> None:
        self._schedule.begin(Book(account, self._size))

    def end(self, account: Account) -> None:
        self._schedule.end(Book(account, self._size))

    def begin_backward(self, parts: Sequence[Segment], account: Account) -> None:
        found = [(part, unit) for part in parts if (unit := self._sharding.unit_of(part.region)) is not None]
        if not found:
            return
        last, unit = found[-1]
        if not self._rerun(last):
            self._schedule.begin_backward(unit, Book(account, self._size))
        if self._holds_input(last, unit):  # nobody holds the gradient of the last layer's exit
            size = self._size(last.region.exit.nbytes)
            account.free(size, HELD)
            self._held_bytes -= size

    def end_backward(self, account: Account) -> None:
        self._schedule.times = 1
        whole = [(self._root_gradient_bytes, UNSHARDED_GRADIENTS)] if self._root_gradient_bytes else []
        self._schedule.end_backward(whole, Book(account, self._size))
        account.free(self._held_bytes, HELD)
