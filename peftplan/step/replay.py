"""What the caching allocator makes of a step: load, then training steps, tensor by tensor, in order.

The walk of each region is recorded once and played for every equal region. About 1 us per event (2026-11), 10
to 25 thousand events a step at 28 to 32 layers: too slow for every estimate, meant for the one that is asked
for. Temporaries of a few KiB (masks' indices, position ids) are left out, and those of rotary tables come as one
tensor each, so reserved bytes are right to a few MiB at best. Not replayed: other work in the process, and a pass
without gradient before the forward (`Graph.prelude`), which the forward exceeds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from peftplan.graph.core import Graph
from peftplan.layouts.units import UNSHARDED_GRADIENTS
from peftplan.recompute.base import Recompute
from peftplan.step.allocator import AllocatorSettings, CachingAllocator, Usage
from peftplan.step.conductor import ACCUMULATED, KEPT, Conductor, Sharding
from peftplan.step.load import Load
from peftplan.step.memory import dies_with_backbone, embedding_is_local
from peftplan.step.segments import Loop, Segment, segments
from peftplan.step.walk import CARRIED, EXIT_GRADIENT, Account, Recording, Rules, exact

Key = tuple[object, ...]
STEADY = frozenset(
    ("weight", "adapter", "buffer", "accumulated", "state", "grad", "input", "forward workspace", "backward workspace",
     "beside", "bucket", KEPT)
)  # fmt: skip
"""What outlives a backward pass; the inputs go with the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """What a step's walk does not hold: bytes of each tensor that lives between steps, in the order they
    appear."""

    load: Load
    states: Sequence[int]
    """Made by the first optimizer step."""
    gradients: Sequence[int]
    """Of the micro-batches before, where they accumulate."""
    workspaces: Sequence[int]
    """Made by the first matrix product of each thread."""
    step_temporaries: Sequence[int]
    """Of the optimizer's step, alive together."""
    buckets: Sequence[int] = ()
    """Of what the layout holds beside all that."""
    between: Sequence[int] = ()
    """Of what the method does between two steps, alive together."""
    beside: Sequence[int] = ()
    """Alive through the step without having a part in it: other micro-batches' and other stages' tensors, buffers."""


@dataclass(slots=True)
class _Track:
    """A segment's recorded events."""

    part: Segment
    forward: list[tuple[str, int]]
    backward: list[tuple[str, int]]
    parameter_gradients: frozenset[str]
    cached: tuple[str, ...]
    """Autocast's copies of weights, which go when the forward has ended."""


Events = list[tuple[str, int]]
TURNS = ("begin", "end", "begin_backward", "end_backward")


class _Recorded(NamedTuple):
    """A step's segments, and what a layout does at the `TURNS` between them."""

    tracks: list[_Track]
    turns: dict[str, Events]


def replay(
    graphs: Sequence[Graph],
    around: Around,
    *,
    recompute: Recompute,
    loop: Loop,
    entry_requires_grad: bool,
    settings: AllocatorSettings | None = None,
    empty_cache: bool = False,
    sharding: Sharding | None = None,
) -> Usage:
    """The peaks of the last of the steps that `graphs` are: one model with batches of its own. A steady step
    needs one before it, because the first makes the optimizer's states in segments that activations leave
    behind."""
    recorded = {id(g): _record(g, recompute, loop, sharding, entry_requires_grad=entry_requires_grad) for g in graphs}
    player = _Player(settings, loop, recompute)
    player.load(around.load)
    player.hold("bucket", around.buckets)
    player.hold("accumulated", around.gradients)
    player.hold("beside", around.beside)
    for number, graph in enumerate(graphs):
        if empty_cache and number:
            player.allocator.empty_cache()
        player.allocator.reset_peaks()
        player.step(graph, recorded[id(graph)], around, first=number == 0)
    return player.usage()


def _record(
    graph: Graph, recompute: Recompute, loop: Loop, sharding: Sharding | None, *, entry_requires_grad: bool
) -> _Recorded:
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
        backward = partial(part.walk.backward, root=part.region.is_penalty or part.region.is_head)
        if conductor is None:
            backward()
        else:
            conductor.around_backward(part, parts[i - 1] if i else None, backward)
    if conductor is not None:
        turn("end_backward", conductor.end_backward)
    tracks = [
        _Track(part, forward, book.take(), frozenset(g.key for g in part.walk.gradients.of_params), cached)
        for part, (forward, cached), book in zip(parts, forwards, books, strict=True)
    ]
    return _Recorded(tracks, turns)


class _Player:
    """Turns recorded events into allocations: every tensor of every layer under a key of its own."""

    def __init__(self, settings: AllocatorSettings | None, loop: Loop, recompute: Recompute) -> None:
        self.allocator = CachingAllocator(settings)
        self._settings = settings
        self._streams: dict[str, CachingAllocator] = {}
        self._loop, self._recompute = loop, recompute
        self._tracks: list[_Track] = []
        self._turns: dict[str, Events] = {}
        self._alive: dict[Key, int] = {}
        self._count = 0
        self._queues: dict[str, deque[int]] = {}
        """What a layout holds, first in, first out."""

    def hold(self, what: str, sizes: Iterable[int]) -> None:
        for index, size in enumerate(sizes):
            self._alloc((what, index), size)

    def load(self, load: Load) -> None:
        for key, size in load.events():
            if size > 0:
                self._alloc(key, size)
            else:
                self._free(key)
        if load.empties:
            self.allocator.empty_cache()
        self.hold("adapter", load.adapters)
        self.hold("buffer", load.buffers)

    def _alloc(self, key: Key, size: int) -> None:
        if size > 0:
            self._count += 1
            self._alive[key] = self._count
            self.allocator.alloc(self._count, size)

    def _queue(self, name: str, size: int) -> None:
        """What a layout allocates or frees."""
        if name == UNSHARDED_GRADIENTS:
            self._free_all(key for key in self._alive if key[0] == "grad")
        elif name == ACCUMULATED:
            self._free(next((key for key in self._alive if key[0] == "accumulated"), ()))
        elif size > 0:
            self._count += 1
            self._queues.setdefault(name, deque()).append(self._count)
            self._stream(name).alloc(self._count, size)
        elif self._queues.get(name):
            self._stream(name).free(self._queues[name].popleft())

    def _stream(self, name: str) -> CachingAllocator:
        """Streams share no blocks."""
        stream, apart, _ = name.partition("/")
        if not apart:
            return self.allocator
        return self._streams.setdefault(stream, CachingAllocator(self._settings))

    def usage(self) -> Usage:
        """Of all streams: each keeps what it has reserved, so their peaks add up."""
        each = [self.allocator.usage(), *(stream.usage() for stream in self._streams.values())]
        return Usage(
            allocated_bytes=sum(one.allocated_bytes for one in each),
            reserved_bytes=sum(one.reserved_bytes for one in each),
            peak_allocated_bytes=sum(one.peak_allocated_bytes for one in each),
            peak_reserved_bytes=sum(one.peak_reserved_bytes for one in each),
        )

    def _turn(self, name: str) -> None:
        for key, size in self._turns.get(name, ()):
            self._queue(key, size)

    def _free(self, key: Key) -> None:
        identity = self._alive.pop(key, None)
        if identity is not None:
            self.allocator.free(identity)

    def _free_all(self, keys: Iterable[Key]) -> None:
        for key in list(keys):
            self._free(key)

    # -- one step
    # -----------------------------------------------------------------------------------------------

    def step(self, graph: Graph, recorded: _Recorded, around: Around, *, first: bool) -> None:
        """zero_grad, forward, backward, optimizer step."""
        self._tracks, self._turns = recorded
        self._free_all(key for key in self._alive if key[0] == "grad")
        while self._queues.get(KEPT):
            self._queue(KEPT, -1)
        if not first and self._turns:
            self.hold("accumulated", around.gradients)
        if not first:
            self.hold("between", around.between)
            self._free_all(key for key in self._alive if key[0] == "between")
        self.hold("input", (t.nbytes for t in graph.inputs))
        if first:
            self.hold("forward workspace", around.workspaces[::2])
        self._turn("begin")
        entries = self._play_forward()
        self._turn("end")
        self._end_of_caller()
        self._free_all(key for key in self._alive if key[0] == "old")
        if self._loop.outputs_until == "loss":
            self._free_all(self._outputs())
        if first:
            self.hold("backward workspace", around.workspaces[1::2])
        self._turn("begin_backward")
        self._play_backward(entries)
        self._turn("end_backward")
        self._end_of_backward()
        if first:
            self.hold("state", around.states)
        self.hold("temporary", around.step_temporaries)
        self._free_all(key for key in self._alive if key[0] == "temporary")
        self._after()

    def _places(self) -> Iterable[tuple[int, int, _Track]]:
        for i, track in enumerate(self._tracks):
            for j in range(track.part.count):
                yield i, j, track

    def _play_forward(self) -> dict[tuple[int, int], Key]:
        """Returns the key of what came into each region."""
        stream: Key = ()
        entries: dict[tuple[int, int], Key] = {}
        held = self._embedding()
        for i, j, track in self._places():
            region = track.part.region
            if region.is_head:
                self._end_of_backbone()
            entries[i, j] = stream
            entry = region.entry.storage if region.entry is not None else None
            for name, size in track.forward:
                if name.startswith("@@"):
                    self._queue(name, size)
                    continue
                key = stream if name == entry else self._key(i, j, name)
                if size > 0 and name in region.handed:
                    self._alloc_taken()
                elif size > 0:
                    self._alloc(key, size)
                elif key != held or i > 1:
                    self._free(key)
            stream = self._key(i, j, region.exit.storage)
        for i, j, track in self._places():
            self._free_all(self._key(i, j, name) for name in track.cached)
        return entries

    def _alloc_taken(self) -> None:
        """What every layer takes is a tensor of its own."""
        for i, j, track in self._places():
            for t in track.part.region.taken:
                self._alloc(self._key(i, j, t.storage), t.nbytes)

    def _embedding(self) -> Key | None:
        """The embedding output, where it is a local of the backbone's forward and nothing else keeps it."""
        local = embedding_is_local(self._tracks[1].part)
        return self._key(0, 0, self._tracks[0].part.region.exit.storage) if local else None

    def _end_of_backbone(self) -> None:
        parts = [track.part for track in self._tracks]
        backbone = [part for part in parts if not part.region.is_head]
        self._free_all(("@", name) for name in dies_with_backbone(backbone))
        first, held = parts[0].region, self._embedding()
        made_leaf = parts[1].walk.offloaded and first.exit.name not in parts[0].walk.need
        if held is not None and first.exit.storage not in first.held and not made_leaf:
            self._free(held)

    def _end_of_caller(self) -> None:
        """What a method's own forward made and held dies with it, unless backward needs it."""
        for i, j, track in self._places():
            walk, region = track.part.walk, track.part.region
            for name in region.held:
                if name == region.exit.storage:
                    embedding = self._embedding()
                    if embedding is not None:
                        self._free(embedding)
                elif not walk.keeps(name):
                    self._free(self._key(i, j, name))

    def _play_backward(self, entries: dict[tuple[int, int], Key]) -> None:
        gradient: Key = ("loss gradient",)
        self._alloc(gradient, 4)
        carried: Key = ()
        for i, j, track in reversed(list(self._places())):
            part, walk = track.part, track.part.walk
            entry = part.region.entry.storage if part.region.entry is not None else None
            first = (i, j) == (1, 0)  # what all layers share dies with the last node that uses it
            latest = carried
            for name, size in track.backward:
                if name.startswith("@@"):
                    self._queue(name, size)
                    continue
                if name == EXIT_GRADIENT:
                    key = gradient
                elif name == CARRIED:
                    key = carried
                elif name in track.parameter_gradients:
                    key = latest = ("grad", i, j, name)
                else:
                    key = entries[i, j] if name == entry and not walk.offloaded else self._key(i, j, name)
                if size > 0:
                    self._alloc(key, size)
                elif name[0] != "@" or first:
                    self._free(key)
            if part.checkpointed:
                if not (i == 1 and j == 0 and self._keeps_leaf()):
                    self._free(entries[i, j])
                if self._recompute.reentrant:
                    self._free(self._key(i, j, part.region.exit.storage))
            if walk.entry_gradient not in (None, EXIT_GRADIENT):
                gradient = self._key(i, j, str(walk.entry_gradient))
            carried = latest
        if self._loop.in_backward is not None:
            self._free(carried)

    def _keeps_leaf(self) -> bool:
        """Whether the embedding output was made a leaf: its accumulator keeps it while the model's output
        lives."""
        first = self._tracks[0].part
        return self._loop.outputs_until != "loss" and first.region.exit.name not in first.walk.need

    def _end_of_backward(self) -> None:
        """What is left is parameter gradients, the output, and the embedding leaf with its gradient."""
        keep = set(self._outputs()) if self._loop.outputs_until != "loss" else set()
        if self._keeps_leaf() and self._tracks[1].part.checkpointed:
            keep.add(self._key(0, 0, self._tracks[0].part.region.exit.storage))
            keep.add(self._key(1, 0, str(self._tracks[1].part.walk.entry_gradient)))
        self._free_all(key for key in self._alive if key[0] not in STEADY and key not in keep)

    def _after(self) -> None:
        """The step's function returns, or its names live on until the next forward has."""
        rest = [key for key in self._alive if key[0] not in STEADY or key[0] == "input"]
        if self._loop.outputs_until != "next":
            self._free_all(rest)
            return
        for key in rest:
            renamed: Key = ("old", *key)
            self._alive[renamed] = self._alive.pop(key)

    def _outputs(self) -> list[Key]:
        """The model's output; where it dies before backward, without what backward needs of it."""
        early = self._loop.outputs_until == "loss"
        return [
            self._key(i, j, name)
            for i, j, track in self._places()
            if not track.part.checkpointed
            for name in track.part.region.returned
            if not (early and track.part.walk.keeps(name))
        ]

    @staticmethod
    def _key(i: int, j: int, name: str) -> Key:
        return ("@", name) if name[0] == "@" else ("at", i, j, name)
