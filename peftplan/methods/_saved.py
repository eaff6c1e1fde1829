"""PEFT's `modules_to_save`: a trainable copy of a module runs, the frozen original stays beside it.

Mirrors peft/utils/other.py ModulesToSaveWrapper, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import replace

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.core import ADAPTER, Graph, Op, Region, Tensor
from peftplan.graph.edit import modules
from peftplan.methods.targets import full_path


def save_modules(graph: Graph, wanted: tuple[str, ...] | None) -> Graph:
    """The graph with copies of `wanted` (module names) trained. Raises RequestError where nothing is so named."""
    if not wanted:
        return graph
    originals: dict[str, Tensor] = {}

    def copy(region: Region, op: Op, t: Tensor) -> Tensor:
        if not t.is_param or t.kind == ADAPTER:
            return t
        own = "lm_head" if op.site == "head" else t.name.removeprefix("@").rsplit(".", 1)[0]
        path = full_path(region, own, 0)
        if not path.endswith(tuple(wanted)):  # _set_trainable: `norm` is input_layernorm too
            return t
        if region.first_index is not None:
            raise Unsupported(f"modules_to_save inside the layers ({path}) is not modelled yet")
        originals.setdefault(t.name, t._replace(trainable=False))
        return t._replace(name=f"@{own}.saved.{t.name.rsplit('.', 1)[1]}", trainable=True, kind=ADAPTER)

    regions = tuple(
        replace(r, ops=tuple(replace(op, ins=tuple(copy(r, op, t) for t in op.ins)) for op in r.ops))
        for r in graph.regions
    )
    if not originals:
        names = sorted({m.path for r in graph.regions for _, _, m in modules(r)})
        raise RequestError(f"modules_to_save {', '.join(wanted)!r} matches nothing; this model has {', '.join(names)}")
    still_used = {t.name for r in regions for op in r.ops for t in op.ins}
    unused = tuple(o for name, o in originals.items() if name not in still_used)
    return replace(graph, regions=regions, unused=(*graph.unused, *unused))
