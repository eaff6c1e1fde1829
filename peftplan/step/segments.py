"""A graph as the segments that a step walks: runs of equal regions, and how they are checkpointed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from peftplan.graph.core import Graph, Region, is_global
from peftplan.recompute.base import Checkpoint, Recompute
from peftplan.step.walk import (
    Account,
    InBackward,
    Plan,
    RegionWalk,
    Rules,
    Updates,
    Waiting,
    propagate_need,
    shared_weights,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """What the training loop itself does to memory.

    `outputs_until`: when the model's output (logits, KV cache) dies: `loss` (before backward: transformers' Trainer),
    `step` (after the optimizer step: a function per step), `next` (when the next forward has returned: a plain
    loop that rebinds the name). `grads_exist`: not the first micro-batch of an accumulation. `in_backward`: weights
    are updated in backward. `clips`: gradients are clipped by their norm before the step. `ema`: what a moving average
    of weights copies: `none`, `trained` or `model`.
    """

    outputs_until: str = "step"
    grads_exist: bool = False
    again: bool = False
    """Whether the step has run the model forward before, and holds the loss of that."""
    in_backward: InBackward | None = None
    clips: bool = False
    ema: str = "none"


@dataclass(slots=True)
class Segment:
    """A run of equal regions, walked once."""

    region: Region
    count: int
    walk: RegionWalk
    forward_delta: int = 0
    forward_saved: int = 0
    entry_bytes: int = 0
    has_backward: bool = True

    @property
    def checkpointed(self) -> bool:
        return self.walk.checkpointed and self.has_backward

    @property
    def holds_entry(self) -> bool:
        """Whether its input stays on the device as the checkpoint's own."""
        return self.checkpointed and not self.walk.offloaded


def segments(
    graph: Graph,
    recompute: Recompute,
    rules: Rules,
    loop: Loop,
    *,
    entry_requires_grad: bool,
    account: Callable[[], Account] = Account,
    ends_apart: bool = False,
) -> Iterator[Segment]:
    """The graph's regions with their needs, runs split where the first layer differs from the rest, and before the last
    where that makes the gradients of weights that all of them share, or uses another region's; then their penalties.
    `ends_apart`: the first and the last layer of every run are segments of their own."""
    needs = hands_on = False
    global_grads: dict[str, int] = {}
    updates = _updates(graph, loop)
    depth = sum(region.count for region in graph.regions if region.first_index is not None)
    made: set[str] = set()
    """Values of the whole model that require a gradient."""
    for region in graph.regions:
        left = region.count
        plan = Plan(region, rules.size)
        is_layer = region.first_index is not None
        shares = any(t.trainable and is_global(t.name) for t in region.params())
        shares |= bool(made) and any(t.name in made for op in region.ops for t in op.ins)
        splits = shares or ends_apart or (updates is not None and updates.policy.late)
        while left:
            leaf = (region.leaf,) if region.leaf is not None and entry_requires_grad else ()
            taken = (t.name for t in region.taken) if hands_on else ()
            need = propagate_need(region, entry_needs=needs, also=(*leaf, *taken, *made))
            hands_on = hands_on or any(name in need for name in region.handed)
            leaves = region.exit.name in need
            opens = ends_apart and left == region.count
            count = left if (leaves == needs and not opens) or not is_layer else 1
            if is_layer and not recompute.uniform:
                count = min(count, recompute.alike(_index(region, left), depth, left))
            count -= is_layer and splits and count == left > 1
            walk = RegionWalk(
                plan,
                need,
                account=account(),
                checkpoint=recompute.checkpoint(region, _index(region, left), depth) if is_layer else None,
                grads_exist=loop.grads_exist,
                global_grads=global_grads,
                updates=updates,
                least_sent_bytes=recompute.least_sent_bytes,
            )
            yield Segment(region=region, count=count, walk=walk)
            left -= count
            needs = leaves or (entry_requires_grad and region.entry is None)
            made.update(name for name in plan.made_globals if name in need)
    for region in graph.regions:
        if region.penalty is not None:
            plan, need = Plan(region.penalty, rules.size), propagate_need(region.penalty, entry_needs=True)
            walk = RegionWalk(plan, need, account=account(), grads_exist=loop.grads_exist, global_grads=global_grads)
            yield Segment(region=region.penalty, count=region.count, walk=walk)


def _index(region: Region, left: int) -> int:
    """The model's index of the layer from which `left` ones of its run are left."""
    return (region.first_index or 0) + region.count - left


def _updates(graph: Graph, loop: Loop) -> Updates | None:
    if loop.in_backward is None:
        return None
    return Updates(policy=loop.in_backward, waiting=Waiting(), shared=shared_weights(graph.regions))


def prelude(graph: Graph, rules: Rules) -> list[Segment]:
    """The pass without gradient that runs before: nothing is kept, and every layer's input lives to its end."""

    def segment(region: Region) -> Segment:
        held = Checkpoint() if region.first_index is not None else None
        walk = RegionWalk(Plan(region, rules.size), set(), checkpoint=held)
        return Segment(region=region, count=region.count, walk=walk, has_backward=False)

    return [segment(region) for region in graph.prelude]
