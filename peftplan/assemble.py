"""A case as the graph of one step, and the weights that train in it."""

from __future__ import annotations

from functools import lru_cache

from peftplan.arch.core import Arch
from peftplan.formats import Format
from peftplan.graph.blocks.decoder import Setup, decoder, module_order
from peftplan.graph.core import Graph, Tensor, is_global
from peftplan.optimizers.base import Trained
from peftplan.resolve import Case
from peftplan.units import DType


def build_graph(case: Case) -> Graph:
    """Architecture -> graph -> format -> method: bases are packed when loaded, adapters come on top."""
    return case.method.apply(base_graph(case.arch, case.setup, case.format, case.compute), case.host)


@lru_cache(maxsize=64)
def base_graph(arch: Arch, setup: Setup, fmt: Format, compute: DType) -> Graph:
    """The base model's graph as its format holds it. Searches put many methods on one base."""
    return fmt.apply(decoder(arch, setup), compute, setup.numerics)


def trained(graph: Graph) -> list[Trained]:
    """Trainable weights in the order an optimizer sees them, neighbours in a layer as neighbours."""
    found: list[Trained] = []
    seen: set[str] = set()
    for run, region in enumerate(graph.regions):
        mine = [t for t in region.params() if t.trainable and t.name not in seen]
        seen.update(t.name for t in mine if is_global(t.name))
        ordered = _as_registered(mine) if len(mine) > 1 else mine
        found.extend(Trained.of(t, region, run) for t in ordered)
    return found


def _as_registered(weights: list[Tensor]) -> list[Tensor]:
    """Weights in order of use as `model.parameters()` orders them: module by module, each weight before its bias,
    which autocast casts first."""
    first: dict[str, int] = {}
    for i, t in enumerate(weights):
        first.setdefault(_module(t), i)
    return sorted(weights, key=lambda t: (*module_order(t.name), first[_module(t)], t.name.endswith(".bias")))


def _module(t: Tensor) -> str:
    return t.name.rpartition(".")[0]
