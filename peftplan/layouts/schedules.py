"""In which order a rank of a pipeline runs its micro-batches, as torch.distributed.pipelining orders them (torch 2.13,
schedules.py): ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble.

Megatron-LM's 1F1B and interleaved schedules have as many micro-batches in flight; its zero-bubble has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from operator import le
from typing import Literal, NamedTuple

from peftplan.layouts.base import Layout

Work = Literal["forward", "backward", "weights"]
"""`backward` makes all gradients, or only those of inputs where `weights` follows for the rest."""


class Action(NamedTuple):
    """A micro-batch of one of the rank's chunks."""

    work: Work
    chunk: int
    micro_batch: int


def actions(layout: Layout, rank: int, micro_batches: int) -> Iterator[Action]:
    """What rank 0 ... pp - 1 of the pipeline does in one step."""
    if layout.schedule == "gpipe":
        return _gpipe(micro_batches)
    if layout.chunks == 1 and layout.schedule == "1f1b":
        return _one_by_one(layout.pp - rank, micro_batches)
    return _interleaved(layout, rank, micro_batches)


def _gpipe(micro_batches: int) -> Iterator[Action]:
    forwards = (Action("forward", 0, i) for i in range(micro_batches))
    return chain(forwards, (Action("backward", 0, i) for i in range(micro_batches)))


def _one_by_one(ahead: int, micro_batches: int) -> Iterator[Action]:
    """`ahead` forwards, then a backward and a forward in turn."""
    ahead = min(ahead, micro_batches)
    yield from (Action("forward", 0, i) for i in range(ahead))
    for i in range(micro_batches):
        yield Action("backward", 0, i)
        if ahead + i < micro_batches:
            yield Action("forward", 0, ahead + i)


def _interleaved(layout: Layout, rank: int, micro_batches: int) -> Iterator[Action]:
    """Depth first over the rank's chunks: the earlier micro-batch goes on before a later one begins."""
    apart = layout.schedule == "zero_bubble"
    a_round = micro_batches // max(1, micro_batches // layout.pp)
    every = layout.chunks * micro_batches
    hops = (layout.pp - 1 - rank) * (1 if apart else 2)
    ahead = min((layout.chunks - 1) * a_round + hops, every)

    def forward_chunk(step: int) -> int:
        return (step // a_round) % layout.chunks

    def backward_chunk(step: int) -> int:
        return layout.chunks - 1 - (step // a_round) % layout.chunks

    put_off = rank if apart else every
    forwards, backwards, weights = (_numbered(w) for w in ("forward", "backward", "weights"))
    done = 0
    for step in range(ahead):
        yield forwards(forward_chunk(step))
    for step in range(every):
        if ahead + step < every:
            yield forwards(forward_chunk(ahead + step))
        yield backwards(backward_chunk(step))
        if step >= put_off:
            yield weights(backward_chunk(done))
            done += 1
    yield from (weights(backward_chunk(step)) for step in range(done, every if apart else 0))


def _numbered(work: Work) -> Callable[[int], Action]:
    """Numbers the micro-batches of each chunk."""
    counts: Counter[int] = Counter()

    def one(chunk: int) -> Action:
        counts[chunk] += 1
        return Action(work, chunk, counts[chunk] - 1)

    return one


class Moment(NamedTuple):
    """An action, how many micro-batches of each chunk are held while it runs, its own not counted, how many wait for
    their weights' gradients, its own counted, and of which chunks weights have gradients already."""

    work: Work
    chunk: int
    held: tuple[int, ...]
    waiting: tuple[int, ...]
    begun: tuple[bool, ...]

    def below(self, other: Moment) -> bool:
        """Whether `other` is the same with at least as much held."""
        same = self.work == other.work and self.chunk == other.chunk
        more = zip((self.held, self.waiting, self.begun), (other.held, other.waiting, other.begun), strict=True)
        return same and all(all(map(le, mine, theirs)) for mine, theirs in more)


def moments(layout: Layout, rank: int, micro_batches: int) -> tuple[Moment, ...]:
    """The moments of a step at which most is held: a few, however many micro-batches there are.

    A micro-batch is held from its forward until its backward, and waits from then on where weights' gradients come
    apart from those of inputs.
    """
    held, waiting, begun = [0] * layout.chunks, [0] * layout.chunks, [False] * layout.chunks
    found: dict[Moment, None] = {}
    each = list(actions(layout, rank, _enough(layout, micro_batches)))
    last: Work = "weights" if layout.schedule == "zero_bubble" else "backward"
    for (work, chunk, number), after in zip(each, [*each[1:], None], strict=True):
        at_once = layout.chunks == 1 and after == Action("weights", chunk, number)
        apart = last == "weights" and not at_once
        if work == "weights" and not waiting[chunk]:
            continue  # it followed at once: torch makes one whole backward of the two (schedules.py, _merge_bw)
        held[chunk] -= work == "backward"
        waiting[chunk] += apart and work == "backward"
        found[Moment(work, chunk, tuple(held), tuple(waiting), tuple(begun))] = None
        held[chunk] += work == "forward"
        waiting[chunk] -= work == "weights"
        begun[chunk] |= work == "weights" or (work == "backward" and not apart)
    return tuple(m for m in found if not any(m is not other and m.below(other) for other in found))


def _enough(layout: Layout, micro_batches: int) -> int:
    """As many micro-batches as fill the pipeline: more repeat what was."""
    if layout.schedule == "gpipe":
        return micro_batches
    return min(micro_batches, 2 * layout.pp * (layout.chunks + 1))
