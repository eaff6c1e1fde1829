"""A model's graph cut into the stages of a pipeline, each a graph of its own."""

from __future__ import annotations

from dataclasses import replace

from peftplan.errors import Unsupported
from peftplan.graph.core import Graph, Op, Region, Tensor, is_global
from peftplan.graph.edit import split_runs
from peftplan.graph.ops import Make
from peftplan.layouts.base import Layout

RECEIVED = "received"
"""The region in which a stage takes over from the one before."""


def stages(graph: Graph, layout: Layout) -> tuple[Graph, ...]:
    """The pp x chunks stages in the model's order; equal ones are one and the same graph.

    Embedding and head belong to the first and the last. Every stage makes masks and rotary tables for itself, as
    models split by torch.distributed.pipelining do.
    """
    _check(graph)
    number = layout.pp * layout.chunks
    layers = sum(r.count for r in graph.regions if r.first_index is not None)
    cuts = bounds(layers, number)
    of = [stage for stage in range(number) for _ in range(cuts[stage + 1] - cuts[stage])]
    runs = split_runs(graph, lambda index: of[index]).regions
    found: list[Graph] = []
    for stage in range(number):
        own = tuple(r for r in runs if r.first_index is not None and of[r.first_index] == stage)
        before = (runs[0],) if stage == 0 else (_received(runs[0], own[0].entry or own[0].exit),)
        after = tuple(r for r in runs[1:] if r.first_index is None) if stage == number - 1 else ()
        made = replace(graph, regions=(*before, *own, *after))
        found.append(next((g for g in found if _alike(g, made)), made))
    return tuple(found)


def bounds(layers: int, number: int) -> list[int]:
    """Where stages begin; the first ones have a layer more where they cannot be equal."""
    least, more = divmod(layers, number)
    return [stage * least + min(stage, more) for stage in range(number + 1)]


def _alike(a: Graph, b: Graph) -> bool:
    """Whether two stages differ by the numbers of their layers only."""
    if len(a.regions) != len(b.regions) or a.regions[0].name != b.regions[0].name:
        return False
    return all(
        x.ops == y.ops and x.count == y.count and x.name == y.name for x, y in zip(a.regions, b.regions, strict=True)
    )


def _received(first: Region, hidden: Tensor) -> Region:
    """The hidden state from the stage before, and what every stage makes for its layers by itself."""
    out = Tensor(RECEIVED, hidden.shape, hidden.dtype)
    ops: list[Op] = [Make(name=RECEIVED, ins=(), out=out, site=RECEIVED)]
    given = {t.name for op in first.ops for t in op.ins if t.kind != "activation"}
    for op in first.ops:
        if is_global(op.out.name) and all(t.name in given for t in op.ins):
            ops.append(op)
            given.add(op.out.name)
    return Region(name=RECEIVED, ops=tuple(ops), entry=None, exit=out)


def _check(graph: Graph) -> None:
    """What acts across the whole depth of a model cannot be cut."""
    first = graph.regions[0]
    if first.handed or first.taken or graph.prelude or any(r.penalty is not None for r in graph.regions):
        raise Unsupported(
            "--layout pp: this method hands tensors to every layer, or adds to the loss for weights of each; "
            "no library runs it in a pipeline; use pp=1"
        )
