"""The vocabulary of transforms: freeze, train, rewrite a module's ops, split a run of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from peftplan.graph.core import PARAMS, Graph, Op, Region, Tensor
from peftplan.graph.ops import Hold


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """The base ops of one projection: what nn.Linear (or its quantized stand-in) does between x and out."""

    path: str
    """Its name inside the layer (`self_attn.q_proj`), or in the model (`lm_head`)."""
    site: str
    ops: tuple[Op, ...]
    weight: Tensor
    widened: Tensor | None = None
    """The value that the rest of the model reads, where that is not `out`: in the input's dtype."""

    @property
    def handed(self) -> Tensor:
        """The value that the rest of the model reads."""
        return self.out if self.widened is None else self.widened

    @property
    def x(self) -> Tensor:
        """What it is given: the first value read that is no parameter, nor of its own making (an unpacked weight)."""
        own: set[str] = set()
        for op in self.ops:
            for t in op.ins:
                if not t.is_param and t.name not in own:
                    return t
            own.add(op.out.name)
        raise AssertionError(f"{self.path} reads nothing")

    @property
    def out(self) -> Tensor:
        return next(op.out for op in reversed(self.ops) if not isinstance(op, Hold))

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


Rewriter = Callable[[Module], tuple[Op, ...]]


def modules(region: Region) -> Iterator[tuple[int, int, Module]]:
    """(start, end, module) for every projection of the region: consecutive base ops of one site."""
    for start, end in region.projections:
        ops = region.ops[start:end]
        site = ops[0].site
        weight = next(t for op in ops for t in op.ins if t.kind in PARAMS and len(t.shape) == 2)
        path = "lm_head" if site == "head" else weight.name.removeprefix("@").removesuffix(".weight")
        yield start, end, Module(path=path, site=site, ops=ops, weight=weight)


def rewrite(region: Region, choose: Callable[[Module], Rewriter | None]) -> Region:
    """Replace the ops of every module for which `choose` gives a rewriter. One of its ops must write the old out."""
    new: list[Op] = []
    homes: dict[str, str] = {}
    done = 0
    for start, end, module in modules(region):
        rewriter = choose(module)
        if rewriter is None:
            continue
        new.extend(region.ops[done:start])
        made = rewriter(module)
        new.extend(made)
        done = end
        written = next(op.out for op in reversed(made) if op.out.name == module.out.name)
        if written.base != module.out.base:
            homes[module.out.name] = written.base
    if not done:
        return region
    new.extend(region.ops[done:])
    changed = replace(region, ops=tuple(new))
    return _settled(changed, homes) if homes else changed


def _settled(region: Region, homes: dict[str, str]) -> Region:
    """The region with every value in the storage it is in: modules that now write their output in place, into the
    storage that `homes` says, move whoever reads or views that output."""

    def moved(t: Tensor) -> Tensor:
        home = homes.get(t.storage)
        return t if home is None else t._replace(base=home)

    ops: list[Op] = []
    for op in region.ops:
        ops.append(op.over(tuple(map(moved, op.ins)), moved(op.out)))
        if ops[-1].out.base:
            homes[op.out.name] = ops[-1].out.base
    return replace(region, ops=tuple(ops), returned=tuple(homes.get(name, name) for name in region.returned))


def writing(ops: Iterable[Op], produced: Tensor, target: Tensor) -> tuple[Op, ...]:
    """`ops` with the value `produced` renamed to `target`, wherever it is written or read."""
    old, new = produced.name, target.name

    def renamed(t: Tensor) -> Tensor:
        if t.name == old:
            return t._replace(name=new)
        return t._replace(base=new) if t.base == old else t

    def rename(op: Op) -> Op:
        return op.over(tuple(map(renamed, op.ins)), renamed(op.out)) if _mentions(op, old) else op

    return tuple(map(rename, ops))


def after(region: Region, path: str, result: Tensor, then: Callable[[Tensor], tuple[tuple[Op, ...], Tensor]]) -> Region:
    """The region with what `then` makes of the `result` of its submodule `path` (`self_attn`) in place of that result.

    `then` is given the submodule's own result and returns (ops, the value that stands in for it).
    """
    own = [i for i, op in enumerate(region.ops) if op.name.startswith(f"{path}.")]
    start, end = own[0], own[-1] + 1
    inner = result._replace(name=f"{result.name}.inner")
    ops, made = then(inner)
    before = writing(region.ops[start:end], result, inner)
    return replace(region, ops=(*region.ops[:start], *before, *writing(ops, made, result), *region.ops[end:]))


def _mentions(op: Op, name: str) -> bool:
    """Whether it writes, reads or views that value."""
    out = op.out
    if out.name == name or out.base == name:
        return True
    for t in op.ins:  # noqa: SIM110 (any() over a generator takes three times as long, and this is every edit's inner loop)
        if t.name == name or t.base == name:
            return True
    return False


def train(graph: Graph, wanted: Callable[[Region, Tensor], bool]) -> Graph:
    """Set `trainable` of every parameter by `wanted(region, parameter)`."""

    def in_region(region: Region) -> Region:
        def flip(t: Tensor) -> Tensor:
            if t.kind not in PARAMS:
                return t
            flag = wanted(region, t)
            return t if t.trainable is flag else t._replace(trainable=flag)

        return replace(region, ops=tuple([op.over(tuple(map(flip, op.ins)), op.out) for op in region.ops]))

    return replace(graph, regions=tuple(map(in_region, graph.regions)))


def split_runs(graph: Graph, key: Callable[[int], object]) -> Graph:
    """Split every run of equal layers where `key(layer index)` changes."""
    out: list[Region] = []
    for region in graph.regions:
        if region.first_index is None:
            out.append(region)
            continue
        first, count = region.first_index, region.count
        for _, run in groupby(range(first, first + count), key):
            indices = list(run)
            whole = len(indices) == count
            out.append(region if whole else replace(region, count=len(indices), first_index=indices[0]))
    return replace(graph, regions=tuple(out))


def insert_layers(graph: Graph, after: Callable[[int], bool]) -> tuple[Graph, frozenset[int]]:
    """The graph with a copy of each layer that `after` picks behind it, and the indices of the copies; all layers are
    numbered anew."""
    regions: list[Region] = []
    copies: set[int] = set()
    for region in graph.regions:
        if region.first_index is None:
            regions.append(region)
            continue
        start, before = region.first_index, len(copies)
        picked = [i for i in range(start, start + region.count) if after(i)]
        copies.update(i + 1 + before + n for n, i in enumerate(picked))
        regions.append(replace(region, count=region.count + len(picked), first_index=start + before))
    return replace(graph, regions=tuple(regions)), frozenset(copies)
