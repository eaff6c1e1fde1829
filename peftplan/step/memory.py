"""From a graph to the memory of a training step, phase by phase.

Equal layers are walked once: the peak inside a run of equal layers is at its first or its last one, because what is
alive outside changes by the same amount per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from peftplan.graph.core import ACTIVATION, Graph, Tensor, is_global
from peftplan.recompute.base import Recompute
from peftplan.step.conductor import Conductor, Sharding
from peftplan.step.segments import Loop, Segment, prelude, segments
from peftplan.step.walk import Account, Rules, Saved, Watermark


class PhasePeak(NamedTuple):
    """The highest point of one phase: bytes in all, of them kept for backward and parameter gradients, and where."""

    phase: str
    bytes: int
    saved_bytes: int
    grad_bytes: int
    where: str


@dataclass(slots=True)
class StepMemory:
    """The readings of a step; everything in bytes on top of `static_bytes` unless it says otherwise."""

    static_bytes: int
    saved: list[tuple[Saved, int]] = field(default_factory=list)
    """What is kept for backward at the end of the forward, with how many layers keep one like it."""
    saved_for_backward_bytes: int = 0
    kept_global_bytes: int = 0
    grad_bytes: int = 0
    held_bytes: int = 0
    """Alive between forward and backward beyond what was before: what backward needs, inputs and outputs."""
    phases: dict[str, PhasePeak] = field(default_factory=dict)
    end_bytes: int = 0
    """Alive when backward is done, parameter gradients included."""
    segments: list[Segment] = field(default_factory=list)
    offloaded: list[tuple[Saved, int]] = field(default_factory=list)
    """What waits in host memory for backward, with how many layers have one like it."""

    @property
    def host_bytes(self) -> int:
        return sum(s.bytes * count for s, count in self.offloaded)

    @property
    def peak(self) -> PhasePeak:
        return max(self.phases.values(), key=lambda p: p.bytes)


class _Account:
    """The running total and the peak of the phase it is in."""

    def __init__(self, total: int, grads: int) -> None:
        self.total = total
        self.saved = 0
        self.grads = grads
        self.taken_grad_bytes = 0
        self.peaks: dict[str, PhasePeak] = {}

    def see(self, phase: str, region: str, mark: Watermark, base: int, saved_base: int, grads_base: int) -> None:
        best = self.peaks.get(phase)
        if best is None or base + mark.bytes > best.bytes:
            self.peaks[phase] = PhasePeak(
                phase,
                base + mark.bytes,
                saved_base + mark.saved_bytes,
                grads_base + mark.grad_bytes,
                f"{region}: {mark.where}",
            )


def run_step(
    graph: Graph,
    *,
    static_bytes: int,
    recompute: Recompute,
    rules: Rules,
    loop: Loop,
    existing_grad_bytes: int = 0,
    entry_requires_grad: bool = False,
    sharding: Sharding | None = None,
) -> StepMemory:
    """Forward, loss and backward of one micro-batch; of one rank, where a `sharding` spreads the model's weights."""
    size = rules.size
    result = StepMemory(static_bytes=static_bytes)
    inputs = sum(size(t.nbytes) for t in graph.inputs)
    account = _Account(static_bytes + inputs + existing_grad_bytes, existing_grad_bytes)
    spread = sharding is not None
    parts = list(segments(graph, recompute, rules, loop, entry_requires_grad=entry_requires_grad, ends_apart=spread))
    conductor = Conductor(sharding, size) if sharding is not None else None
    penalties = [part for part in parts if part.region.is_penalty]
    model = parts[: len(parts) - len(penalties)]
    loss_bytes = size(model[-1].region.exit.nbytes)
    sum_bytes = size(penalties[0].region.exit.nbytes) if penalties else 0
    previous_outputs = 0
    if loop.outputs_until == "next":
        previous_outputs = loss_bytes + _returned_bytes(parts)
    elif loop.again:
        previous_outputs = loss_bytes
    account.total += previous_outputs
    before, ahead = account.total, prelude(graph, rules)
    for part in ahead:
        _forward(part, account, reads_embedding=False)
    account.total = before
    leaf = entry_requires_grad and parts[0].region.exit.name not in parts[0].walk.need
    """Whether the embedding output is a leaf made to require a gradient, which its accumulator keeps."""
    if conductor is not None:
        _apart("forward", account, conductor.begin)
    for i, part in enumerate(model):
        if part.region.is_head:
            _end_of_backbone(parts[:i], account, keeps_embedding=leaf and parts[1].walk.offloaded)
        _forward(part, account, reads_embedding=i == 1, conductor=conductor)
    if conductor is not None:
        _apart("forward", account, conductor.end)
    account.total += sum_bytes
    for part in penalties:
        _forward(part, account, reads_embedding=False)
    account.total -= sum_bytes + previous_outputs
    if not model[-1].region.is_head:
        _end_of_backbone(model, account, keeps_embedding=leaf and parts[1].walk.offloaded)
    _end_of_forward(parts, account, result, loop, leaf=leaf)
    result.held_bytes = account.total - static_bytes - existing_grad_bytes
    account.total += loss_bytes  # the gradient of the loss, a one
    account.total += sum_bytes  # the gradient of the penalties' sum
    for part in reversed(penalties):
        _backward(part, account, root=True)
    account.total -= sum_bytes
    if conductor is not None:
        _apart("backward", account, partial(conductor.begin_backward, model))
    for i, part in reversed(list(enumerate(model))):
        previous = model[i - 1] if i else None
        _backward(part, account, root=part is model[-1], conductor=conductor, previous=previous)
    _last_updates(parts, account)
    if conductor is not None:
        _apart("backward", account, conductor.end_backward)
    account.total -= loss_bytes
    if not recompute.reentrant:  # CheckpointFunction's node holds its function's arguments for as long as it lives
        account.total -= result.kept_global_bytes
    if loop.outputs_until == "loss":
        account.total -= sum(part.walk.pinned_bytes * part.count for part in parts)
    if leaf:  # kept with its gradient; where the checkpoint held it, that let go of it
        held = parts[1].entry_bytes
        account.total += held if parts[1].holds_entry else 0
        account.total -= 2 * held if loop.outputs_until == "loss" else 0
    result.grad_bytes = account.grads
    result.end_bytes = account.total
    result.phases = account.peaks
    result.segments = [*ahead, *parts]
    return result


def _apart(phase: str, account: _Account, act: Callable[[Account], None]) -> None:
    """What happens between regions."""
    mine = Account()
    mine.start_phase("between regions")
    act(mine)
    account.see(phase, "model", mine.peak, account.total, account.saved, account.grads)
    account.total += mine.current
    account.grads += mine.grad_bytes


def _last_updates(parts: list[Segment], account: _Account) -> None:
    """Backward is done: gradients that still wait for their update go."""
    region, gradients = parts[0].region, parts[0].walk.gradients
    left = gradients.last_updates(lambda name: next(t for p in parts for t in p.region.params() if t.name == name))
    for size, scratch in left:
        mark = Watermark(scratch, 0, 0, "the last update")
        account.see("backward", region.name, mark, account.total, account.saved, account.grads)
        account.total -= size
        account.grads -= size


def _returned_bytes(parts: list[Segment]) -> int:
    """The model's outputs besides the loss: logits, cache."""
    return sum(
        part.count * part.walk.plan.storage_bytes(name)
        for part in parts
        if not part.checkpointed
        for name in part.region.returned
    )


def embedding_is_local(first: Segment) -> bool:
    """Whether the embedding output, which the first layer reads, lives on only as a local of the backbone's forward."""
    return first.walk.offloaded or not (first.checkpointed or first.walk.entry_saved)


def _embedding_held(first: Segment) -> int:
    """Bytes of the embedding output beyond the first layer."""
    return first.entry_bytes if embedding_is_local(first) else 0


def _forward(part: Segment, account: _Account, *, reads_embedding: bool, conductor: Conductor | None = None) -> None:
    walk, entry = part.walk, part.region.entry
    part.entry_bytes = walk.plan.size(entry.nbytes) if entry is not None else 0
    walk.start_phase()
    if conductor is None:
        walk.forward()
    else:
        conductor.around_forward(part, walk.forward)
    part.forward_delta = walk.account.current
    part.forward_saved = walk.account.saved_bytes + (part.entry_bytes if part.holds_entry else 0)
    repeats = part.count - 1
    held = _embedding_held(part) if reads_embedding else 0
    base = account.total + repeats * max(0, part.forward_delta) + (held if repeats else 0)
    saved_base = account.saved + repeats * part.forward_saved
    marks = {"loss" if part.region.is_penalty else "forward": walk.account.peak}
    if walk.before_loss is not None:
        marks = {"forward": walk.before_loss, "loss": walk.account.peak}
    for phase, mark in marks.items():
        account.see(phase, part.region.name, mark, base, saved_base, account.grads)
    account.total += part.count * part.forward_delta + held
    account.saved += part.count * part.forward_saved


def _made_for_layers(parts: Sequence[Segment]) -> list[Tensor]:
    """Values made once and passed to every layer: positions, rotary tables, masks. A checkpoint holds its arguments."""
    first = parts[0].region
    others = {*first.held, *first.idle}
    return [op.out for op in first.ops if is_global(op.out.name) and op.out.name not in others]


def dies_with_backbone(parts: Sequence[Segment]) -> dict[str, int]:
    """Locals of the backbone's forward (positions, tables, masks) with their bytes, of the `parts` it is made of: all
    but what is kept for backward and what the caller holds."""
    kept = {*parts[0].region.held, *(s.tensor.storage for part in parts for s in part.walk.saved)}
    if any(part.checkpointed for part in parts):
        kept.update(t.storage for t in _made_for_layers(parts))
    made = (item for part in parts for item in part.walk.plan.made_globals.items())
    return {name: size for name, size in made if name not in kept}


def _end_of_backbone(parts: list[Segment], account: _Account, *, keeps_embedding: bool) -> None:
    """The backbone's forward returns, and with it goes the embedding output, unless the caller holds that."""
    account.total -= sum(dies_with_backbone(parts).values())
    if keeps_embedding:
        account.saved += parts[1].entry_bytes
    elif parts[0].region.exit.storage not in parts[0].region.held:
        account.total -= _embedding_held(parts[1])


def _end_of_caller(parts: list[Segment], account: _Account) -> None:
    """Whoever called the model returns: a method's own forward, and what it made."""
    for part in parts:
        if part.region.held:
            _after(part, part.walk.drop_held, account)
    first = parts[0].region
    if first.exit.storage in first.held:
        account.total -= _embedding_held(parts[1])


def _after(part: Segment, drop: Callable[[], None], account: _Account) -> None:
    """What every region of the run holds goes."""
    before = part.walk.account.current
    drop()
    change = part.walk.account.current - before
    part.forward_delta += change
    account.total += part.count * change


def _end_of_forward(parts: list[Segment], account: _Account, result: StepMemory, loop: Loop, *, leaf: bool) -> None:
    """The model's forward has returned: what is kept for backward is settled."""
    _settle(parts, result, leaf=leaf)
    _end_of_caller(parts, account)
    for part in parts:  # autocast ends, and with it its cache
        _after(part, part.walk.drop_cached, account)
    if loop.outputs_until == "loss":
        for part in parts:
            _after(part, part.walk.drop_returned, account)


def _settle(parts: list[Segment], result: StepMemory, *, leaf: bool) -> None:
    """What is kept for backward, values of the whole model once."""
    seen: set[str] = set()
    if leaf and parts[1].walk.offloaded:
        embedded = parts[0].region.exit
        result.saved.append((Saved("leaf", embedded, embedded.nbytes), 1))
    for part in parts:
        size = part.walk.plan.size
        for s in part.walk.saved:
            storage = s.tensor.storage
            if not is_global(storage):
                result.saved.append((s, part.count))
            elif storage not in seen:
                seen.add(storage)
                result.saved.append((s, 1))
                if s.tensor.kind == ACTIVATION:
                    result.kept_global_bytes += size(s.bytes)
        if part.checkpointed:
            entry = part.region.entry
            assert entry is not None
            for t in _made_for_layers(parts):
                if t.storage not in seen:
                    seen.add(t.storage)
                    result.saved.append((Saved("checkpoint", t, t.nbytes), 1))
                    result.kept_global_bytes += size(t.nbytes)
            if part.holds_entry:
                result.saved.append((Saved("checkpoint", entry, entry.nbytes), part.count))
        result.offloaded += [(s, part.count) for s in part.walk.sent]
    result.saved_for_backward_bytes = sum(s.bytes * count for s, count in result.saved)


def _backward(
    part: Segment,
    account: _Account,
    *,
    root: bool,
    conductor: Conductor | None = None,
    previous: Segment | None = None,
) -> None:
    walk, mine = part.walk, part.walk.account
    start_total, start = account.total, mine.current
    walk.start_phase()
    saved_before, grads_before = mine.saved_bytes, mine.grad_bytes
    walk.parts_grad_bytes = account.taken_grad_bytes if part.region.handed else 0
    if conductor is None:
        walk.backward(root=root)
    else:
        conductor.around_backward(part, previous, root=root)
    if part.checkpointed:
        mine.current -= part.entry_bytes if part.holds_entry else 0
        if walk.reentrant:  # CheckpointFunction.backward holds the recomputed output to its end
            mine.current -= walk.plan.size(part.region.exit.nbytes)
    delta = mine.current - start
    account.taken_grad_bytes += part.count * walk.taken_grad_bytes
    grads = mine.grad_bytes - grads_before
    saved = mine.saved_bytes - saved_before - (part.entry_bytes if part.holds_entry else 0)
    outside, saved_outside = start_total - start, account.saved - saved_before
    for i in {0, part.count - 1}:
        account.see(
            "backward",
            part.region.name,
            mine.peak,
            outside + i * delta,
            saved_outside + i * saved,
            account.grads - grads_before + i * grads,
        )
    account.total += part.count * delta
    account.saved += part.count * saved
    account.grads += part.count * grads
