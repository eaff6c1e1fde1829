"""Segments of a step walked once, with what they allocate and free written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from peftplan.graph.core import Graph
from peftplan.recompute.base import Recompute
from peftplan.step.conductor import Conductor, Sharding
from peftplan.step.segments import Loop, Segment, segments
from peftplan.step.walk import Account, Recording, Rules, exact


@dataclass(slots=True)
class Track:
    """A segment's recorded events."""

    part: Segment
    forward: list[tuple[str, int]]
    backward: list[tuple[str, int]]
    parameter_gradients: frozenset[str]
    cached: tuple[str, ...]
    """Autocast's copies of weights, which go when the forward has ended."""


Events = list[tuple[str, int]]
TURNS = ("begin", "end", "begin_backward", "end_backward")


class Recorded(NamedTuple):
    """A step's segments, and what a layout does at the `TURNS` between them."""

    tracks: list[Track]
    turns: dict[str, Events]


def record(
    graph: Graph, recompute: Recompute, loop: Loop, sharding: Sharding | None, *, entry_requires_grad: bool
) -> Recorded:
    """Each segment walked forward and backward with what it allocates and frees written down."""
    books: list[Recording] = []

    def opened() -> Recording:
        books.append(Recording())
        return books[-1]

    rules = Rules(size=exact)
    spread = sharding is not None
    run = segments(
        graph, recompute, rules, loop, entry_requires_grad=entry_requires_grad, account=opened, ends_apart=spread
    )
    parts = list(run)
    conductor = Conductor(sharding, exact) if sharding is not None else None
    turns: dict[str, Events] = {}

    def turn(name: str, act: Callable[[Account], None]) -> None:
        book = Recording()
        act(book)
        turns[name] = book.take()

    if conductor is not None:
        turn("begin", conductor.begin)
    for part in parts:
        if conductor is None:
            part.walk.forward()
        else:
            conductor.around_forward(part, part.walk.forward)
    if conductor is not None:
        turn("end", conductor.end)
        turn("begin_backward", partial(conductor.begin_backward, parts))
    forwards = [(book.take(), part.walk.cached_names) for part, book in zip(parts, books, strict=True)]
    for i, (part, book) in reversed(list(enumerate(zip(parts, books, strict=True)))):
        if loop.outputs_until == "loss":
            part.walk.drop_returned()
            book.take()
        root = part.region.is_penalty or part.region.is_head
        if conductor is None:
            part.walk.backward(root=root)
        else:
            conductor.around_backward(part, parts[i - 1] if i else None, root=root)
    if conductor is not None:
        turn("end_backward", conductor.end_backward)
    tracks = [
        Track(part, forward, book.take(), frozenset(g.key for g in part.walk.gradients.of_params), cached)
        for part, (forward, cached), book in zip(parts, forwards, books, strict=True)
    ]
    return Recorded(tracks, turns)
