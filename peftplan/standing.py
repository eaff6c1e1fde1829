"""What lives between steps, by kind, and the gradients of micro-batches before."""

from __future__ import annotations

from peftplan.assemble import Trainees, state_bytes
from peftplan.graph.core import ADAPTER, Graph
from peftplan.graph.ops import Linear, PackedLinear
from peftplan.hardware.overheads import workspace_bytes
from peftplan.layouts.units import Before
from peftplan.optimizers.base import Trained
from peftplan.resolve import Case
from peftplan.spread import Spread
from peftplan.step.walk import Rules
from peftplan.training_loop import average_sizes


def static_bytes(case: Case, graph: Graph, train: Trainees, rules: Rules, rank: Spread | None) -> dict[str, int]:
    """What lives between steps, by kind."""
    size = rules.size
    kinds = {"weight": 0, "adapter": 0, "buffer": 0, "state": 0}
    if rank is None:
        for t, count in graph.params():
            kinds["adapter" if t.kind == ADAPTER else "weight"] += case.format.held_bytes(t, size) * count
    else:
        for one in rank.held:
            kinds[one.kind] += sum(map(size, one.sizes)) * one.times
        kinds["bucket"] = sum(map(size, rank.buffers))
    kinds["buffer"] = sum(size(t.nbytes) for t in graph.buffers) + sum(map(size, case.recompute.buffers(graph)))
    kinds["state"] = state_bytes(case.optimizer, train, rules.size, case.job.backend)
    kinds["average"] = sum(map(size, average_sizes(case.loop, graph, train.weights)))
    if case.job.backend == "cuda":
        kinds["workspace"] = _workspaces(case, graph)
    return kinds


def _workspaces(case: Case, graph: Graph) -> int:
    """cuBLAS and cuBLASLt workspaces, allocated by the first matrix products and kept."""
    return workspace_bytes(
        case.setup.numerics.capability,
        biased_linears=has_biased_linears(graph),
        recomputes=case.recompute.layers,
    )


def has_biased_linears(graph: Graph) -> bool:
    """Whether some linear layer adds a bias, which is what takes cuBLASLt into use."""
    linears = (op for r in graph.regions for op in r.ops if len(op.ins) > 2)
    return any(isinstance(op, (Linear, PackedLinear)) for op in linears)


def gradient_bytes(case: Case, graph: Graph, weights: list[Trained], rules: Rules) -> int:
    """Bytes of all gradients between micro-batches; one that is a view of a larger tensor's keeps that whole."""
    if case.optimizer.holds_gradients:
        return 0
    wholes = 0
    for region in graph.regions:
        for op in region.ops:
            parts = [t for t in op.ins if t.trainable and t.dtype is op.out.dtype] if op.narrows else []
            if parts:
                apart = sum(rules.size(t.logical_bytes) for t in parts)
                wholes += (rules.size(op.out.nbytes) - apart) * region.count
    return sum(rules.size(w.bytes) * w.copies for w in weights) + wholes


def existing_bytes(
    case: Case, graph: Graph, train: Trainees, rules: Rules, spread: tuple[Spread | None, Before]
) -> int:
    """Bytes of the gradients of micro-batches before."""
    rank, before = spread
    if before == "none":
        return 0
    if rank is None:
        return gradient_bytes(case, graph, train.weights, rules)
    return sum(map(rules.size, rank.gradients(before)))
