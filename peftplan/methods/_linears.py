"""Putting one branch on each chosen linear layer: what most adapters share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from peftplan.errors import Unsupported
from peftplan.graph.core import Graph, Op, Region
from peftplan.graph.edit import Module, Rewriter, rewrite, split_runs
from peftplan.graph.ops import PackedLinear
from peftplan.methods.base import Host
from peftplan.methods.targets import Targets, chosen_paths, full_path

S = TypeVar("S")
Plan = Mapping[int | str, Mapping[str, S]]
"""For each layer index, and each region outside the layers by name: what each adapted module (by path) is given."""


def plan(graph: Graph, choice: Targets, setting: Callable[[str], S]) -> Plan[S]:
    """`setting(full module name)` of every module that `choice` picks. Raises RequestError where it picks none."""
    layer = next(r for r in graph.regions if r.first_index is not None)
    by_name = {r.name: r for r in graph.regions}
    result: dict[int | str, dict[str, S]] = {}
    for key, paths in chosen_paths(graph, choice).items():
        region, index = (layer, key) if isinstance(key, int) else (by_name[key], 0)
        result[key] = {p: setting(full_path(region, p, index)) for p in sorted(paths)}
    return result


def adapt(graph: Graph, planned: Plan[S], branch: Callable[[Module, S], tuple[Op, ...]], *, name: str) -> Graph:
    """The graph with `branch(module, setting)` in place of each planned module's ops.

    Raises Unsupported where a planned module is the embedding.
    """

    def rewritten(region: Region) -> Region:
        wanted = planned[region.name if region.first_index is None else region.first_index]

        def choose(module: Module) -> Rewriter | None:
            if module.path not in wanted:
                return None
            if module.site == "embed":
                raise Unsupported(f"{name} on embeddings is not modelled; leave embed_tokens out of --target-modules")
            return lambda m: branch(m, wanted[m.path])

        return rewrite(region, choose)

    split = split_runs(graph, lambda index: planned[index])
    return replace(split, regions=tuple(map(rewritten, split.regions)))


def packed(module: Module) -> PackedLinear | None:
    """The kernel on packed weights that stands in for the linear layer, if one does."""
    return next((op for op in module.ops if isinstance(op, PackedLinear)), None)


def sees_autocast(host: Host) -> bool:
    """What torch.is_autocast_enabled() answers in PEFT's code: it knows CUDA's autocast only."""
    return host.numerics.autocast is not None and host.numerics.backend == "cuda"
