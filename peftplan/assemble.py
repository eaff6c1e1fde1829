"""A case as the graph of one step, and the weights that train in it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from peftplan.arch.core import Arch
from peftplan.formats import Format
from peftplan.graph.blocks.decoder import Setup, decoder, module_order
from peftplan.graph.core import Graph, Region, Tensor, is_global
from peftplan.graph.edit import split_runs
from peftplan.optimizers.base import Trained
from peftplan.resolve import Case
from peftplan.units import DType


def build_graph(case: Case) -> Graph:
    """Architecture -> graph -> format -> method: bases are packed when loaded, adapters come on top."""
    base = base_graph(case.arch, case.setup, case.format, case.compute)
    mixed = case.setup.numerics.autocast is not None and case.setup.types.embedding is DType.float32
    if mixed and not case.format.packed:
        base = _widened(case, base)
    return case.method.apply(base, case.host)


def _widened(case: Case, base: Graph) -> Graph:
    """The base as it is where adapters undo autocast: what reads their layers' outputs reads the input's dtype.

    The stream between layers is fp32 either way, so layers of one kind and another fit together.
    """
    wide = case.method.widens(base, case.host)

    def like(region: Region) -> Region:
        paths = wide[region.name if region.first_index is None else region.first_index]
        types = replace(case.setup.types, widened=paths)
        other = base_graph(case.arch, replace(case.setup, types=types), case.format, case.compute)
        first = region.first_index
        if first is None:
            return next(r for r in other.regions if r.name == region.name)
        runs = (r for r in other.regions if r.first_index is not None)
        run = next(r for r in runs if (r.first_index or 0) <= first < (r.first_index or 0) + r.count)
        return replace(run, first_index=first, count=region.count)

    if not any(wide.values()):
        return base
    split = split_runs(base, lambda index: wide[index])
    return replace(split, regions=tuple(map(like, split.regions)))


@lru_cache(maxsize=64)
def base_graph(arch: Arch, setup: Setup, fmt: Format, compute: DType) -> Graph:
    """The base model's graph as its format holds it. Searches put many methods on one base."""
    return fmt.apply(decoder(arch, setup), compute, setup.numerics)


def trained(graph: Graph) -> list[Trained]:
    """Trainable weights in the order an optimizer sees them, neighbours in a layer as neighbours."""
    found: list[Trained] = []
    seen: set[str] = set()
    for region in graph.regions:
        mine = [t for t in region.params() if t.trainable and t.name not in seen]
        seen.update(t.name for t in mine if is_global(t.name))
        ordered = _as_registered(mine) if len(mine) > 1 else mine
        found.extend([Trained(t.numel, t.dtype, 1 if is_global(t.name) else region.count) for t in ordered])
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
