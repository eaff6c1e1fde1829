"""PEFT's `modules_to_save`: a trainable copy of a module runs, the frozen original stays beside it.

A name stands for every module whose full name ends in it; what is inside such a module is copied with it. Copies keep
the original's dtype.
Mirrors peft/utils/other.py ModulesToSaveWrapper and _set_trainable, peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.core import ADAPTER, Graph, Op, Region, Tensor
from peftplan.graph.edit import modules, split_runs
from peftplan.methods.targets import full_path

_LISTS = ("model.layers",)
"""Modules that are a list of others, which has no forward of its own."""


def save_modules(graph: Graph, wanted: tuple[str, ...] | None) -> Graph:
    """The graph with copies of `wanted` (endings of module names) trained.

    Raises RequestError where nothing is so named, or what is named cannot be copied or trained.
    """
    if not wanted:
        return graph
    for name in _LISTS:
        if name.endswith(wanted):
            raise RequestError(f"modules_to_save {','.join(wanted)!r} names {name}, a list that PEFT cannot copy; "
                               "name modules inside it")  # fmt: skip
    graph = split_runs(graph, lambda index: _copied_layer(graph, index, wanted))
    originals: list[Tensor] = []
    regions = tuple(_with_copies(r, wanted, originals) for r in graph.regions)
    if not originals:
        names = sorted({m.path.rsplit(".", 1)[-1] for r in graph.regions for _, _, m in modules(r)})
        raise RequestError(f"modules_to_save {', '.join(wanted)!r} matches nothing; this model has {', '.join(names)}")
    still_used = {t.name for r in regions for op in r.ops for t in op.ins if t.name.startswith("@")}
    left = {o.name: o for o in originals if o.name.startswith("@")}
    unused = [o for o in originals if not o.name.startswith("@")]
    unused += [o for name, o in left.items() if name not in still_used]
    scale = next((t for t in graph.buffers if t.name == "@embed_scale"), None)
    embeds = any(t.name == "@embed_tokens.saved.weight" for r in regions for t in r.params())
    copied = (scale._replace(name="@embed_scale.saved"),) if scale is not None and embeds else ()
    return replace(graph, regions=regions, unused=(*graph.unused, *unused), buffers=(*graph.buffers, *copied))


def _copied_layer(graph: Graph, index: int, wanted: tuple[str, ...]) -> frozenset[str]:
    """What of the layer `index` is copied."""
    here = (r for r in graph.regions if r.first_index is not None and 0 <= index - r.first_index < r.count)
    return frozenset(own for r in here for own, _ in _parameters(r) if _saved_path(r, own, index, wanted))


def _parameters(region: Region) -> Iterator[tuple[str, Tensor]]:
    """Every base weight with the path of its module in the region; the head's is its own, whatever it is tied to."""
    for op in region.ops:
        for t in op.ins:
            if t.is_param and t.kind != ADAPTER:
                yield _owner(op, t), t


def _owner(op: Op, t: Tensor) -> str:
    return "lm_head" if op.site == "head" else t.name.removeprefix("@").rsplit(".", 1)[0]


def _saved_path(region: Region, own: str, index: int, wanted: tuple[str, ...]) -> str | None:
    """The full name of the module that is copied and holds the weights of `own`: itself, or one around it.

    Raises Unsupported where it is copied twice over.
    """
    path = full_path(region, own, index)
    parts = path.split(".")
    around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    found = [p for p in around if p.endswith(wanted)]
    if len(found) > 1:
        raise Unsupported(f"modules_to_save: {found[1]} inside {found[0]} is not modelled; name one of them")
    return found[0] if found else None


def _with_copies(region: Region, wanted: tuple[str, ...], originals: list[Tensor]) -> Region:
    first = region.first_index or 0
    copied = {own for own, _ in _parameters(region) if _saved_path(region, own, first, wanted)}
    if not copied:
        return region
    _check(region, copied, wanted)
    before = {t.name: t for own, t in _parameters(region) if own in copied}
    owned = 0 if region.borrows else region.count
    originals.extend(t._replace(trainable=False) for t in before.values() for _ in range(owned))

    def copy(op: Op, t: Tensor) -> Tensor:
        if not t.is_param or t.kind == ADAPTER or _owner(op, t) not in copied:
            return t
        at = "@" if region.first_index is None else ""
        name = f"{at}{_owner(op, t)}.saved.{t.name.rsplit('.', 1)[1]}"
        return t._replace(name=name, trainable=True, kind=ADAPTER)

    return replace(region, ops=tuple(op.over(tuple(copy(op, t) for t in op.ins), op.out) for op in region.ops))


def _check(region: Region, copied: set[str], wanted: tuple[str, ...]) -> None:
    """Raises RequestError for copies of packed weights, and of modules that are adapted too."""
    for own, t in _parameters(region):
        if own in copied and t.stored_bytes is not None:
            raise RequestError(f"modules_to_save: packed weights do not train ({own}); use an unquantized --format")
    adapted = {t.name.removeprefix("@") for t in region.params() if t.kind == ADAPTER}
    for own in copied:
        if any(name.startswith(f"{own}.") for name in adapted):
            raise RequestError(f"modules_to_save {','.join(wanted)!r} ends the name of {own}, which is adapted: PEFT "
                               "cannot copy it; write whole names")  # fmt: skip
