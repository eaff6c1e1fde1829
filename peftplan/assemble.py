"""A case as the graph of one step, the weights that train in it, and what the optimizer holds and takes for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from peftplan.arch.core import Arch
from peftplan.formats import Format
from peftplan.graph.blocks.decoder import decoder, module_order
from peftplan.graph.blocks.megatron import megatron_decoder
from peftplan.graph.blocks.setup import Setup
from peftplan.graph.core import Graph, Region, Tensor, is_global
from peftplan.graph.edit import split_runs, train
from peftplan.graph.float8 import in_float8
from peftplan.graph.mesh import ONE
from peftplan.optimizers.base import Optimizer, Trained
from peftplan.resolve import Case
from peftplan.training_loop import clipping_bytes
from peftplan.units import DType

Size = Callable[[int], int]
"""How many bytes a request counts for."""


def build_graph(case: Case) -> Graph:
    """Architecture -> graph -> format -> method: bases are packed when loaded, adapters come on top."""
    base = base_graph(case.arch, case.setup, case.format, case.compute)
    mixed = case.setup.numerics.autocast is not None and case.setup.types.embedding is DType.float32
    if mixed and not case.format.packed:
        base = _widened(case, base)
    return case.setup.kernels.fuse(case.method.apply(base, case.host))


def whole_graph(case: Case, graph: Graph) -> Graph:
    """All ranks' shares of operations together, of which `graph` is one rank's."""
    if case.layout.mesh.alone:
        return graph
    return build_graph(replace(case, setup=replace(case.setup, mesh=ONE), host=replace(case.host, mesh=ONE)))


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


def as_run(case: Case, graph: Graph) -> Graph:
    """The graph that a step runs: nothing in it needs a gradient where the method does without."""
    return graph if case.method.backward else train(graph, lambda _, __: False)


@lru_cache(maxsize=64)
def base_graph(arch: Arch, setup: Setup, fmt: Format, compute: DType) -> Graph:
    """The base model's graph as its format holds it. Searches put many methods on one base."""
    build = megatron_decoder if setup.mesh.plan == "megatron" else decoder
    base = fmt.apply(build(arch, setup), compute, setup.numerics)
    return in_float8(base, setup.numerics) if setup.numerics.float8 else base


class Trainees(NamedTuple):
    """The weights that train, as gradients and optimizer see them; one list, but for methods that say otherwise."""

    weights: list[Trained]
    """With a gradient."""
    stepped: list[Trained]
    """What the optimizer steps over: the weights, or the method's copies of them."""
    remembered: list[Trained]
    """What the optimizer has states of."""
    aside: tuple[int, ...] = ()
    """Tensors that the method makes of the largest gradient for a moment, before the optimizer's step."""

    @property
    def copied(self) -> list[Trained]:
        """The copies."""
        return [] if self.stepped is self.weights else self.stepped


def trainees(case: Case, graph: Graph) -> Trainees:
    """The weights of a case's graph that train."""
    weights = trained(graph)
    if not case.method.backward:
        return Trainees([], [], [], case.method.aside(max((w.bytes for w in weights), default=0)))
    masters, known = case.method.masters, case.method.remembered(graph)
    if masters is None:
        aside = case.method.aside(max((w.bytes for w in weights), default=0))
        return Trainees(weights, weights, weights if known is graph else trained(known), aside)
    stepped = [w._replace(dtype=masters) for w in weights]
    remembered = stepped if known is graph else [w._replace(dtype=masters) for w in trained(known)]
    return Trainees(weights, stepped, remembered)


def host_state_bytes(optimizer: Optimizer, trainees: Trainees, backend: str = "cuda") -> int:
    """Bytes of the optimizer's states in host memory."""
    return sum(s.bytes * s.copies for s in optimizer.states(trainees.remembered, backend) if s.host)


def state_bytes(optimizer: Optimizer, trainees: Trainees, size: Size, backend: str = "cuda") -> int:
    """Optimizer states that live on the device between steps, and the copies that it steps over."""
    states = sum(size(s.bytes) * s.copies for s in optimizer.states(trainees.remembered, backend) if not s.host)
    return states + sum(size(w.bytes) * w.copies for w in trainees.copied)


def step_bytes(
    optimizer: Optimizer, trainees: Trainees, size: Size, backend: str = "cuda", *, clips: bool = False
) -> int:
    """The most that the optimizer's step takes at once beyond weights, gradients and states; where gradients are
    clipped, the norms before it too.

    Where it steps over copies, each gradient becomes one of its weight's copy, and goes when that is there; afterwards
    each copy is cast back, one at a time.
    """
    own = max(_stepping(optimizer, trainees.stepped, backend), sum(map(size, trainees.aside)))
    own = max(own, clipping_bytes(trainees.weights) if clips else 0)
    cast = [(copy, w) for copy, w in zip(trainees.copied, trainees.weights, strict=False) if copy.dtype is not w.dtype]
    grown = sum((size(copy.bytes) - size(w.bytes)) * w.copies for copy, w in cast)
    return grown + max(own, max((size(w.bytes) for _, w in cast), default=0))


def _stepping(optimizer: Optimizer, weights: list[Trained], backend: str) -> int:
    return 0 if optimizer.frees_gradients else optimizer.step_bytes(weights, backend)


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
