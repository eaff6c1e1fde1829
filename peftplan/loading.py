"""How the model of a case comes onto the device."""

from __future__ import annotations

from collections.abc import Iterator

from peftplan.graph.blocks.decoder import module_order
from peftplan.graph.core import ADAPTER, Graph, Region, Tensor, is_global
from peftplan.process import load_knobs
from peftplan.resolve import Case
from peftplan.step.load import Load, Weight

Placed = tuple[tuple[int, int], Tensor]
"""A tensor with the place of its module: regions in the model's order, layers by number."""


def loading(case: Case, graph: Graph) -> Load:
    """Loading as the case's settings say.

    Packed weights are loaded onto the device one after another; unpacked ones are loaded on the CPU and then moved,
    parameter by parameter, as Trainer does, unless `load.on_device=true` says that from_pretrained has a device_map.
    """
    packed = case.format.packed
    knobs = load_knobs(case.job)
    placed = list(_placed(graph, adapters=False))
    moved = not (packed or knobs.on_device)
    order = sorted(range(len(placed)), key=lambda i: _module_rank(placed[i]) if moved else _name_rank(placed[i]))
    ranks = {index: rank for rank, index in enumerate(order)}
    modules = [ranks[i] for i in sorted(range(len(placed)), key=lambda i: _module_rank(placed[i]))]
    prepared = packed and case.format.upcasts_rest
    return Load(
        weights=[_weight(case, placed[i][1]) for i in order],
        modules=modules,
        adapters=[t.nbytes for _, t in sorted(_placed(graph, adapters=True), key=_module_rank)],
        buffers=[t.nbytes for t in graph.buffers],
        warmed=not moved and knobs.warm_up,
        threads=0 if moved else knobs.threads,
        empties=knobs.empty_cache if knobs.empty_cache is not None else prepared,
    )


def _placed(graph: Graph, *, adapters: bool) -> Iterator[Placed]:
    """Every weight, or every adapter weight, with its place; what all layers share once."""
    seen: set[str] = set()
    for number, region in enumerate(graph.regions):
        mine = [t for t in region.owned() if (t.kind == ADAPTER) is adapters and t.name not in seen]
        seen.update(t.name for t in mine if is_global(t.name))
        for layer in range(region.count):
            yield from (((_room(region, number), (region.first_index or 0) + layer), t) for t in mine)
    yield from (((len(graph.regions), 0), t) for t in graph.unused if (t.kind == ADAPTER) is adapters)


def _room(region: Region, number: int) -> int:
    """Layers of all kinds share one place."""
    return number if region.first_index is None else 1


def _module_rank(placed: Placed) -> tuple[object, ...]:
    """In the order of `model.parameters()`."""
    place, t = placed
    return place, module_order(t.name)


def _name_rank(placed: Placed) -> tuple[object, ...]:
    """In the order of sorted names: `lm_head` before `model`, layers by number, modules by name
    (core_model_loading.py, dot_natural_key)."""
    place, t = placed
    name = t.name.removeprefix("@").split(".")
    return name[0] != "lm_head", place, name


def _weight(case: Case, t: Tensor) -> Weight:
    half = case.setup.types.linear.size
    fmt = case.format
    if t.stored_bytes is not None:
        if fmt.arrives_packed:
            return Weight(arrives_bytes=0, expected_bytes=t.stored_bytes, pieces=fmt.pieces(t))
        return Weight(arrives_bytes=t.numel * half, expected_bytes=fmt.expected_bytes(t.numel), pieces=fmt.pieces(t))
    arrives = t.numel * min(half, t.dtype.size)
    casts: tuple[int, ...] = (4 * t.numel,) if fmt.packed and fmt.upcasts_rest and arrives < 4 * t.numel else ()
    if casts and t.dtype.size < 4:
        casts = (*casts, t.nbytes)
    return Weight(arrives_bytes=arrives, expected_bytes=arrives, casts=casts)
