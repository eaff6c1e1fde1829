"""A case as the graph of one step, and the weights that train in it."""

from __future__ import annotations

from peftplan.graph.blocks.decoder import decoder, module_order
from peftplan.graph.core import Graph, Tensor, is_global
from peftplan.optimizers.base import Trained
from peftplan.resolve import Case


def build_graph(case: Case) -> Graph:
    """Architecture -> graph -> format -> method: bases are packed when loaded, adapters come on top."""
    graph = decoder(case.arch, case.setup)
    graph = case.format.apply(graph, case.compute, case.setup.numerics)
    return case.method.apply(graph, case.host)


def trained(graph: Graph) -> list[Trained]:
    """Trainable weights in the order an optimizer sees them, neighbours in a layer as neighbours."""
    found: list[Trained] = []
    seen: set[str] = set()
    for region in graph.regions:
        mine = [t for t in region.params() if t.trainable and t.name not in seen]
        seen.update(t.name for t in mine if is_global(t.name))
        found.extend(Trained(t.numel, t.dtype, 1 if is_global(t.name) else region.count) for t in _as_registered(mine))
    return found


def _as_registered(weights: list[Tensor]) -> list[Tensor]:
    """Weights in order of use as `model.parameters()` orders them: module by module, each weight before its bias,
    which autocast casts first."""
    first: dict[str, int] = {}
    for i, t in enumerate(weights):
        first.setdefault(t.name.rpartition(".")[0], i)
    return sorted(
        weights, key=lambda t: (*module_order(t.name), first[t.name.rpartition(".")[0]], t.name.endswith(".bias"))
    )
