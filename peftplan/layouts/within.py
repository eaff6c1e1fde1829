"""What the ranks of one replica send each other in a step: those that share matrices, or the tokens of a sequence.

Backward is taken to send wherever it could (of frozen first layers it does not: errs high by one layer's share), a
layer that is run again to send what its forward did. Megatron's sums without sequence parallelism are left out (low).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from peftplan.graph.core import Graph, Op
from peftplan.graph.ops import Collective, MainGradLinear
from peftplan.layouts.base import Layout
from peftplan.layouts.units import Collective as Kind
from peftplan.layouts.units import Message


def messages(graph: Graph, layout: Layout, *, micro_batches: int, again: bool) -> Sequence[Message]:
    """All of one optimizer step; `again` where layers are run again in backward."""
    if layout.mesh.alone and layout.mesh.plan != "megatron":
        return ()
    sizes: Counter[tuple[Kind, int]] = Counter()
    calls: Counter[tuple[Kind, int]] = Counter()
    for region in graph.regions:
        forwards = 1 + (again and region.first_index is not None)
        for op in region.ops:
            for kind, size, ranks, back in _told(op, layout):
                times = micro_batches * region.count * (1 if back else forwards)
                sizes[kind, ranks] += size * times
                calls[kind, ranks] += times
    inside = (Message(kind, sizes[kind, n], n, within=True, calls=calls[kind, n]) for kind, n in sizes)
    return (*inside, *_of_states(graph, layout))


def _told(op: Op, layout: Layout) -> Iterator[tuple[Kind, int, int, bool]]:
    """(what is done, bytes of the whole tensor, by how many, whether in backward)."""
    if isinstance(op, Collective):
        whole = max(op.ins[0].nbytes, op.out.nbytes)
        if op.forward and op.forward != "slice":
            yield op.forward, whole, op.ranks, False
        if op.back and op.back != "slice":
            yield op.back, whole, op.ranks, True
    elif isinstance(op, MainGradLinear):
        tp = layout.mesh.tp
        if op.gathered_bytes:
            yield "all_gather", op.gathered_bytes, tp, False
            yield "all_gather", op.gathered_bytes, tp, True
            yield "reduce_scatter", op.gathered_bytes, tp, True
        if op.partial_bytes:
            yield "reduce_scatter", op.partial_bytes, tp, False
            yield "all_gather", op.partial_bytes, tp, True


def _of_states(graph: Graph, layout: Layout) -> Iterator[Message]:
    """Megatron's replicas: fp32 gradients summed once a step, and with states dealt among ranks, weights gathered."""
    ranks = layout.dp * layout.mesh.cp
    if layout.mesh.plan != "megatron" or ranks == 1:
        return
    trained = sum(t.numel * count for t, count in graph.params() if t.trainable)
    if layout.style == "zero1":
        yield Message("reduce_scatter", 4 * trained, ranks)
        yield Message("all_gather", 2 * trained, ranks)
    else:
        yield Message("all_reduce", 4 * trained, ranks)
