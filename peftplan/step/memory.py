"""From a graph to the memory of a training step, phase by phase.

Equal layers are walked once: the peak inside a run of equal layers is at its first or its last one, because what is
alive outside changes by the same amount per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from peftplan.graph.core import ACTIVATION, Graph, Region, Tensor, is_global
from peftplan.step.walk import Plan, RegionWalk, Rules, Saved, Watermark, propagate_need


@dataclass(frozen=True, kw_only=True, slots=True)
class Recompute:
    """How a layer is checkpointed: not at all, or wholly, by torch.utils.checkpoint's two flavours."""

    layers: bool = False
    reentrant: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """What the training loop itself does to memory.

    `outputs_until`: when the model's output (logits, KV cache) dies: `loss` (before backward: transformers' Trainer),
    `step` (after the optimizer step: a function per step), `next` (when the next forward has returned: a plain
    loop that rebinds the name). `grads_exist`: not the first micro-batch of an accumulation.
    """

    outputs_until: str = "step"
    grads_exist: bool = False


@dataclass(slots=True)
class Segment:
    """A run of equal regions, walked once."""

    region: Region
    count: int
    walk: RegionWalk
    checkpointed: bool
    forward_delta: int = 0
    forward_saved: int = 0
    entry_bytes: int = 0
    pinned_bytes: int = 0
    """What each region of the run still holds when its backward is done, until the loss dies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhasePeak:
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
    phases: dict[str, PhasePeak] = field(default_factory=dict)
    end_bytes: int = 0
    """Alive when backward is done, parameter gradients included."""
    segments: list[Segment] = field(default_factory=list)

    @property
    def peak(self) -> PhasePeak:
        return max(self.phases.values(), key=lambda p: p.bytes)


def segments(
    graph: Graph, recompute: Recompute, rules: Rules, loop: Loop, *, entry_requires_grad: bool
) -> Iterator[Segment]:
    """The graph's regions with their needs, runs split where the first layer differs from the rest."""
    needs = hands_on = False
    global_grads: dict[str, int] = {}
    for region in graph.regions:
        left = region.count
        plan = Plan(region, rules)
        while left:
            leaf = (region.leaf,) if region.leaf is not None and entry_requires_grad else ()
            taken = (t.name for t in region.taken) if hands_on else ()
            need = propagate_need(region, entry_needs=needs, also=(*leaf, *taken))
            hands_on = hands_on or any(name in need for name in region.handed)
            leaves = region.exit.name in need
            is_layer = region.first_index is not None
            count = left if leaves == needs or not is_layer else 1
            walk = RegionWalk(
                region=region,
                need=need,
                rules=rules,
                plan=plan,
                grads_exist=loop.grads_exist,
                global_grads=global_grads,
            )
            yield Segment(region=region, count=count, walk=walk, checkpointed=is_layer and recompute.layers)
            left -= count
            needs = leaves or (entry_requires_grad and region.entry is None)


class _Account:
    """The running total and the peak of the phase it is in."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.saved = 0
        self.grads = 0
        self.taken_grad_bytes = 0
        self.peaks: dict[str, PhasePeak] = {}

    def see(self, phase: str, region: str, mark: Watermark, base: int, saved_base: int, grads_base: int) -> None:
        value = base + mark.bytes
        best = self.peaks.get(phase)
        if best is None or value > best.bytes:
            self.peaks[phase] = PhasePeak(
                phase=phase,
                bytes=value,
                saved_bytes=saved_base + mark.saved_bytes,
                grad_bytes=grads_base + mark.grad_bytes,
                where=f"{region}: {mark.where}",
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
) -> StepMemory:
    """Forward, loss and backward of one micro-batch."""
    result = StepMemory(static_bytes=static_bytes)
    inputs = sum(rules.size(t.nbytes) for t in graph.inputs)
    account = _Account(static_bytes + inputs + existing_grad_bytes)
    account.grads = existing_grad_bytes
    parts = list(segments(graph, recompute, rules, loop, entry_requires_grad=entry_requires_grad))
    previous_outputs = 0
    if loop.outputs_until == "next":
        previous_outputs = _returned_bytes(parts)
        account.total += previous_outputs
    for i, part in enumerate(parts):
        if part.region.name == "head":
            _end_of_backbone(parts[:i], account)
        _forward(part, account, recompute)
        if i == 1:
            account.total += _embedding_held(part)
    _end_of_forward(parts, account, result, loop, previous_outputs)
    account.total += rules.size(parts[-1].region.exit.nbytes)  # the gradient of the loss, a one
    for part in reversed(parts):
        _backward(part, account, recompute, root=part is parts[-1])
    account.total -= rules.size(parts[-1].region.exit.nbytes)
    if not recompute.reentrant:  # CheckpointFunction's node holds its function's arguments for as long as it lives
        account.total -= result.kept_global_bytes
    if loop.outputs_until == "loss":
        account.total -= sum(part.pinned_bytes * part.count for part in parts)
    if entry_requires_grad and not parts[0].walk.need & {parts[0].region.exit.name}:
        # The embedding output is a leaf made to require a gradient: its accumulator keeps it and its gradient.
        held = parts[1].entry_bytes
        account.total += held if loop.outputs_until != "loss" else -held
    result.grad_bytes = account.grads
    result.end_bytes = account.total
    result.phases = account.peaks
    result.segments = parts
    return result


def _returned_bytes(parts: list[Segment]) -> int:
    """The model's outputs: logits, cache, and the loss itself."""
    total = parts[-1].walk.rules.size(parts[-1].region.exit.nbytes)
    for part in parts:
        names = {op.out.name: part.walk.rules.size(op.out.nbytes) for op in part.region.ops}
        keeps = part.region.returned if not part.checkpointed else ()
        total += part.count * sum(names[n] for n in keeps)
    return total


def _embedding_held(first: Segment) -> int:
    """Bytes of the embedding output beyond the first layer: a local of the backbone's forward, unless kept anyway."""
    return 0 if first.checkpointed or first.walk.entry_saved else first.entry_bytes


def _forward(part: Segment, account: _Account, recompute: Recompute) -> None:
    walk, entry = part.walk, part.region.entry
    part.entry_bytes = walk.rules.size(entry.nbytes) if entry is not None else 0
    walk.owns_entry = not part.checkpointed
    walk.start_phase()
    walk.forward(keep=not part.checkpointed, stash=not (part.checkpointed and recompute.reentrant))
    part.forward_delta = walk.current
    part.forward_saved = walk.saved_bytes + (part.entry_bytes if part.checkpointed else 0)
    repeats = part.count - 1
    base = account.total + repeats * max(0, part.forward_delta)
    saved_base = account.saved + repeats * part.forward_saved
    marks = {"forward": walk.peak}
    if walk.before_loss is not None:
        marks = {"forward": walk.before_loss, "loss": walk.peak}
    for phase, mark in marks.items():
        account.see(phase, part.region.name, mark, base, saved_base, account.grads)
    account.total += part.count * part.forward_delta
    account.saved += part.count * part.forward_saved


def _made_for_layers(parts: list[Segment]) -> list[Tensor]:
    """Values made once and passed to every layer: positions, rotary tables, masks. A checkpoint holds its arguments."""
    first = parts[0].region
    return [op.out for op in first.ops if is_global(op.out.name) and op.out.name not in first.held]


def _end_of_backbone(parts: list[Segment], account: _Account) -> None:
    """Locals of the backbone's forward die: positions, tables, masks, the embedding output; what is kept stays, and
    what the caller holds."""
    held = parts[0].region.held
    kept = {*held, *(s.tensor.storage for part in parts for s in part.walk.saved)}
    if any(part.checkpointed for part in parts):
        kept.update(t.storage for t in _made_for_layers(parts))
    for part in parts:
        for op in part.region.ops:
            if is_global(op.out.name) and op.out.name not in kept:
                account.total -= part.walk.rules.size(op.out.nbytes)
    if parts[0].region.exit.storage not in held:
        account.total -= _embedding_held(parts[1])


def _end_of_caller(parts: list[Segment], account: _Account) -> None:
    """Whoever called the model returns: a method's own forward, and what it made."""
    for part in parts:
        before = part.walk.current
        part.walk.drop_held()
        change = part.walk.current - before
        part.forward_delta += change
        account.total += part.count * change
    first = parts[0].region
    if first.exit.storage in first.held:
        account.total -= _embedding_held(parts[1])


def _end_of_forward(
    parts: list[Segment], account: _Account, result: StepMemory, loop: Loop, previous_outputs: int
) -> None:
    """The model's forward has returned: what is kept for backward is settled."""
    seen: set[str] = set()
    shared = _made_for_layers(parts)
    for part in parts:
        for s in part.walk.saved:
            if not is_global(s.tensor.storage):
                result.saved.append((s, part.count))
            elif s.tensor.storage not in seen:
                seen.add(s.tensor.storage)
                result.saved.append((s, 1))
                if s.tensor.kind == ACTIVATION:
                    result.kept_global_bytes += part.walk.rules.size(s.bytes)
        if part.checkpointed:
            entry = part.region.entry
            assert entry is not None
            for t in shared:
                if t.storage not in seen:
                    seen.add(t.storage)
                    result.saved.append((Saved(op="checkpoint", tensor=t, bytes=t.nbytes), 1))
                    result.kept_global_bytes += part.walk.rules.size(t.nbytes)
            result.saved.append((Saved(op="checkpoint", tensor=entry, bytes=entry.nbytes), part.count))
    account.total -= previous_outputs
    _end_of_caller(parts, account)
    for part in parts:  # autocast ends, and with it its cache
        account.total -= part.count * part.walk.cached_bytes
        part.walk.current -= part.walk.cached_bytes
        part.forward_delta -= part.walk.cached_bytes
    result.saved_for_backward_bytes = sum(s.bytes * count for s, count in result.saved)
    if loop.outputs_until == "loss":
        for part in parts:
            before = part.walk.current
            part.walk.drop_returned()
            change = part.walk.current - before
            part.forward_delta += change
            account.total += part.count * change


def _backward(part: Segment, account: _Account, recompute: Recompute, *, root: bool) -> None:
    walk = part.walk
    start_total, start = account.total, walk.current
    walk.start_phase()
    saved_before, grads_before = walk.saved_bytes, walk.grad_bytes
    if part.checkpointed:
        stashed = walk.forget_pinned()
        if recompute.reentrant:
            walk.forward()
        walk.backward(recompute=not recompute.reentrant)
        walk.drop_pinned()
        walk.current -= part.entry_bytes
        if recompute.reentrant:  # CheckpointFunction.backward holds the recomputed output to its end
            walk.current -= walk.rules.size(part.region.exit.nbytes)
        part.pinned_bytes = stashed
    else:
        walk.backward(root=root)
        part.pinned_bytes = walk.forget_pinned()
    delta = walk.current - start
    if part.region.handed:
        account.total -= account.taken_grad_bytes
    account.taken_grad_bytes += part.count * walk.taken_grad_bytes
    grads = walk.grad_bytes - grads_before
    saved = walk.saved_bytes - saved_before - (part.entry_bytes if part.checkpointed else 0)
    outside, saved_outside = start_total - start, account.saved - saved_before
    for i in {0, part.count - 1}:
        account.see(
            "backward",
            part.region.name,
            walk.peak,
            outside + i * delta,
            saved_outside + i * saved,
            account.grads - grads_before + i * grads,
        )
    account.total += part.count * delta
    account.saved += part.count * saved
    account.grads += part.count * grads
