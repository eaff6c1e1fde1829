"""Chosen rows of an embedding or a head train: the weight is copied with them put in (PEFT's TrainableTokensLayer).

Mirrors peft/tuners/trainable_tokens/layer.py TrainableTokensLayer.forward_adapters and get_merged_weights, and
peft/utils/other.py set_additional_trainable_modules, peft 0.21.2. The rows as they were lie beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Grad, Graph, Op, Region, Tensor
from peftplan.graph.ops import Embedding
from peftplan.methods.base import Host
from peftplan.units import DType

Rows = Mapping[str, tuple[int, ...]]
"""By module (`embed_tokens`, `lm_head`): which rows train."""


def train_rows(graph: Graph, rows: Rows, host: Host, *, tie: bool = False) -> Graph:
    """The graph with `rows` trained. Those of the embedding are the head's too where the two are tied, unless the head
    has other rows of its own; `tie` insists on that.

    Raises RequestError for modules that the model lacks or that are adapted, and rows that cannot be tied.
    """
    named = {_module(name): chosen for name, chosen in rows.items()}
    if not all(named.values()):
        raise RequestError("method.trainable_token_indices: say which rows train, e.g. [5,6]")
    both = set(named.values())
    if tie and host.arch.tied and len(both) > 1:
        raise RequestError("method.ensure_weight_tying: tied modules train the same rows; give both the same indices")
    asked = frozenset(named)
    if host.arch.tied and len(both) == 1 and "embed_tokens" in named:
        named = {"embed_tokens": named["embed_tokens"], "lm_head": named["embed_tokens"]}
    tied = host.arch.tied and len(named) == 2 and len(both) == 1
    trained = {
        name: _Trained(name="trainable_tokens" if tied else f"{name}.trainable_tokens", count=len(chosen), host=host)
        for name, chosen in named.items()
    }
    regions = tuple(_rewritten(r, trained, asked) for r in graph.regions)
    originals = {t.original.name: t.original for t in trained.values()}
    return replace(graph, regions=regions, buffers=(*graph.buffers, *originals.values()))


def _module(name: str) -> str:
    found = next((m for m in ("embed_tokens", "lm_head") if m.endswith(name) or name.endswith(f".{m}")), None)
    if found is None:
        raise RequestError(f"method.trainable_token_indices: {name!r} has no rows of tokens; use embed_tokens, lm_head")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trained:
    """The rows of one module, or of two tied ones."""

    name: str
    count: int
    host: Host

    @property
    def delta(self) -> Tensor:
        return self._rows("delta", ADAPTER)._replace(trainable=True)

    @property
    def original(self) -> Tensor:
        return self._rows("original", BUFFER)

    def _rows(self, what: str, kind: str) -> Tensor:
        return Tensor(f"@{self.name}_{what}", (self.count, self.host.arch.hidden), self.host.new_dtype, kind)


def _rewritten(region: Region, trained: Mapping[str, _Trained], asked: frozenset[str]) -> Region:
    """`asked` names modules; those tied to them may be adapted, and their base reads the rows."""
    new: list[Op] = []
    for op in region.ops:
        site = "lm_head" if op.site == "head" else "embed_tokens" if op.site == "embed" else ""
        weight = next((t for t in op.ins if t.is_param and len(t.shape) == 2 and op.part == "base"), None)
        if site not in trained or weight is None:
            new.append(op)
            continue
        if site in asked or weight.kind == ADAPTER:
            _check(region, site)
        b = Builder(trained[site].host.numerics, f"{op.name}.")
        with b.marked(op.site, "down"):
            merged = _merged(b, weight, trained[site].delta)
        ins = tuple(merged if t is weight else t for t in op.ins)
        new += (*b.ops, replace(op, ins=ins, part="down" if not isinstance(op, Embedding) else op.part))
    return replace(region, ops=tuple(new))


def _check(region: Region, module: str) -> None:
    if any(t.kind == ADAPTER and t.name.removeprefix("@").startswith(f"{module}.") for t in region.params()):
        raise RequestError(
            f"method.trainable_token_indices: PEFT trains rows of modules that are not adapted or saved, as {module} "
            "is; name it once"
        )


def _merged(b: Builder, weight: Tensor, delta: Tensor) -> Tensor:
    """W.index_copy(0, index, delta): keeps the index and the rows; the gradient's rows are selected."""
    index = b.plain("token_index", delta.shape[0], dtype=DType.int64)
    given = b.cast(delta, weight.dtype, label="token_delta")
    out = Tensor("", weight.shape, weight.dtype)
    grads = (Grad(given, given.logical_bytes),)
    return b.formula("merged", out, weight, given, index, keeps=(index, given), grads=grads)
