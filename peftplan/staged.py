"""The memory of a pipeline's rank, from the steps of its chunks: how many micro-batches each holds when.

torch.distributed.pipelining (2.13, stage.py): buffers for what is received, hidden states and their gradients, are
made for every micro-batch of a step and stay; a stage's output is held until its backward, the last one's until the
next forward has returned; the gradient sent last is held until the next one is; token ids and labels of all
micro-batches are there from the start. Megatron-Core receives into a new tensor each time and empties outputs when
they are sent (pipeline_parallel/schedules.py, deallocate_output_tensor).
Where gradients of weights come apart from those of inputs (zero bubble), what a forward held stays until both are
there, with the gradients of the outputs of whatever has weights (_backward.py, stage_backward_input): errs either way
by a few percent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from peftplan.layouts import Layout
from peftplan.layouts.schedules import Moment, moments
from peftplan.layouts.stages import RECEIVED
from peftplan.step.memory import PhasePeak, StepMemory, embedding_is_local
from peftplan.step.walk import Rules

_PHASES = {"forward": ("forward", "loss"), "backward": ("backward",), "weights": ("backward",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A stage's step: the first micro-batch's, whose weights have no gradients yet, and that of any later one."""

    first: StepMemory
    later: StepMemory
    grad_bytes: int
    """Gradients between micro-batches."""
    input_bytes: int
    """Token ids, labels and masks of a micro-batch."""
    rules: Rules

    @property
    def received_bytes(self) -> int:
        """The hidden state that comes in; none where the stage begins with the embedding."""
        region = self.later.segments[0].region
        return self.rules.size(region.exit.nbytes) if region.name == RECEIVED else 0

    @property
    def sent_bytes(self) -> int:
        """The hidden state that goes out, none where the stage ends with the loss."""
        region = self.later.segments[-1].region
        return 0 if region.is_head else self.rules.size(region.exit.nbytes)

    @property
    def put_off_bytes(self) -> int:
        """Gradients of the outputs of all that has trained weights."""
        return sum(
            part.count * self.rules.size(op.out.logical_bytes)
            for part in self.later.segments
            for op in part.region.ops
            if any(t.is_param and t.trainable for t in op.ins)
        )

    @property
    def keeps_received(self) -> bool:
        """Whether a micro-batch's forward holds on to what it received."""
        return bool(self.received_bytes) and not embedding_is_local(self.later.segments[1])


class RankStep(NamedTuple):
    """The step of one rank, the moment of its peak, and what it receives into."""

    step: StepMemory
    moment: Moment
    buffer_bytes: int

    def beside(self, layout: Layout, chunks: Sequence[Chunk]) -> list[int]:
        """The tensors that other micro-batches hold at the peak, and the buffers but for those in use."""
        sizes: list[int] = []
        for count, chunk in zip(self.moment.held, chunks, strict=True):
            each = [chunk.rules.size(saved.bytes) for saved, n in chunk.later.saved for _ in range(n)]
            rest = _held_bytes(layout, chunk) - sum(each)
            sizes += count * [*each, *([rest] if rest > 0 else [])]
        return [*sizes, max(0, self.buffer_bytes - chunks[self.moment.chunk].received_bytes)]


def rank_step(layout: Layout, rank: int, chunks: Sequence[Chunk], micro_batches: int, static_bytes: int) -> RankStep:
    """The step of one rank with `chunks`, the peak of each phase over all that it does.

    `static_bytes` is what the rank holds between steps, without the buffers that it receives into: those are added.
    """
    buffers = _buffers(layout, chunks, micro_batches)
    static = static_bytes + buffers
    peaks: dict[str, PhasePeak] = {}
    each = [(peak, m) for m in moments(layout, rank, micro_batches) for peak in _peaks(layout, chunks, m, static)]
    for peak, _ in each:
        best = peaks.get(peak.phase)
        if best is None or peak.bytes > best.bytes:
            peaks[peak.phase] = peak
    fullest = max(each, key=lambda one: one[0].bytes)[1]
    whole = chunks[fullest.chunk].later
    every = sum(chunk.grad_bytes for chunk in chunks)
    step = replace(
        whole,
        static_bytes=static,
        saved=[each for chunk in chunks for each in chunk.later.saved],
        saved_for_backward_bytes=_saved(layout, rank, chunks, micro_batches),
        grad_bytes=every,
        end_bytes=static + every,
        phases=peaks,
        segments=[part for chunk in chunks for part in chunk.later.segments],
    )
    return RankStep(step, fullest, buffers)


def _peaks(layout: Layout, chunks: Sequence[Chunk], moment: Moment, static: int) -> list[PhasePeak]:
    """The phases of one moment, with what all other micro-batches hold."""
    chunk = chunks[moment.chunk]
    step = chunk.later if moment.begun[moment.chunk] else chunk.first
    existing = chunk.grad_bytes if moment.begun[moment.chunk] else 0
    grads = sum(c.grad_bytes for c, begun in zip(chunks, moment.begun, strict=True) if begun)
    held = sum(count * _held_bytes(layout, c) for c, count in zip(chunks, moment.held, strict=True))
    others = [n - (moment.work != "forward" and c is chunk) for n, c in zip(moment.waiting, chunks, strict=True)]
    held += sum(n * _held_bytes(layout, c) for n, c in zip(others, chunks, strict=True) if n > 0)
    held += sum(n * c.put_off_bytes for n, c in zip(moment.waiting, chunks, strict=True))
    found = []
    for phase in (step.phases[name] for name in _PHASES[moment.work] if name in step.phases):
        own = phase.bytes - step.static_bytes - existing - _counted_twice(layout, chunk, moment)
        found.append(
            phase._replace(
                bytes=static + grads + held + own,
                saved_bytes=phase.saved_bytes + held,
                grad_bytes=phase.grad_bytes - existing + grads,
            )
        )
    return found


def _buffers(layout: Layout, chunks: Sequence[Chunk], micro_batches: int) -> int:
    """What is received into, and the batch, made once for all micro-batches; the gradient sent last."""
    if layout.framework == "megatron":
        return 0
    received = sum(chunk.received_bytes + chunk.sent_bytes for chunk in chunks)
    waiting = max(chunk.received_bytes for chunk in chunks) if micro_batches > 1 else 0
    return micro_batches * (received + chunks[0].input_bytes) + waiting


def _held_bytes(layout: Layout, chunk: Chunk) -> int:
    """What a micro-batch that waits for its backward holds, beyond buffers."""
    if layout.framework == "megatron":
        return chunk.later.held_bytes - chunk.sent_bytes
    return chunk.later.held_bytes - chunk.input_bytes - chunk.received_bytes * chunk.keeps_received


def _counted_twice(layout: Layout, chunk: Chunk, moment: Moment) -> int:
    """Of the micro-batch that runs: what is received is in the buffers already, the gradient that comes in too."""
    if layout.framework == "megatron":
        return chunk.sent_bytes if moment.work != "forward" else 0
    if moment.work == "forward":
        return chunk.input_bytes + chunk.received_bytes
    return chunk.input_bytes + chunk.received_bytes * chunk.keeps_received + chunk.sent_bytes


def _saved(layout: Layout, rank: int, chunks: Sequence[Chunk], micro_batches: int) -> int:
    """The most that is kept for backward at once, all micro-batches in flight together."""
    return max(
        sum((n + (c == m.chunk)) * chunks[c].later.saved_for_backward_bytes for c, n in enumerate(m.held))
        for m in moments(layout, rank, micro_batches)
    )


def bubble(layout: Layout, micro_batches: int) -> float:
    """How much longer than its own work a rank is busy or waits: (M + (pp - 1) / chunks) / M (Narayanan 2021,
    arXiv:2104.04473, section 2.2); a third of the waits where gradients of weights fill them (Qi 2023,
    arXiv:2401.10241, table 1)."""
    waits = (layout.pp - 1) / layout.chunks
    return 1 + waits * (1 / 3 if layout.schedule == "zero_bubble" else 1) / micro_batches


def labels(layout: Layout) -> Iterator[str]:
    """What the ranks of a pipeline are called in answers."""
    for rank in range(layout.pp):
        stages = range(rank, layout.pp * layout.chunks, layout.pp)
        yield f"pipeline rank {rank}: stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
