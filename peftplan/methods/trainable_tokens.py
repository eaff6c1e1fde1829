"""Trainable tokens: chosen rows of the embedding train, and of the head where it is tied (PEFT 0.21.2's own).

Trains: token_indices x hidden.
Keeps for backward: a whole copy of the embedding where it is the head too; its gradient is as large for a moment.
Not modelled: other target_modules than the embedding.
Mirrors peft/tuners/trainable_tokens/layer.py TrainableTokensLayer.forward_adapters and get_merged_weights, peft 0.21.2.
The rows as they were lie beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Grad, Graph, Op, Region, Tensor
from peftplan.graph.ops import Embedding
from peftplan.methods._linears import COMMON
from peftplan.methods.base import Family, Host, Method
from peftplan.units import DType

HARMLESS = COMMON | {"init_weights"}
EMBEDDING = "@embed_tokens.weight"


@final
@dataclass(frozen=True)
class TrainableTokens(Method):
    """PEFT's TrainableTokensConfig."""

    token_indices: tuple[int, ...] = ()
    target_modules: Any = None
    family: ClassVar[Family] = "selective"

    def apply(self, graph: Graph, host: Host) -> Graph:
        if not self.token_indices:
            raise RequestError("method.token_indices: say which rows of the embedding train, e.g. [5,6]")
        if self.target_modules not in (None, "embed_tokens", ("embed_tokens",)):
            raise Unsupported(f"trainable tokens of {self.target_modules} are not modelled; leave --target-modules out")
        shape = (len(self.token_indices), host.arch.hidden)
        before = Tensor("@trainable_tokens_original", shape, host.new_dtype, BUFFER)
        regions = tuple(self._rewritten(r, host) for r in graph.regions)
        return replace(graph, regions=regions, buffers=(*graph.buffers, before))

    def _rewritten(self, region: Region, host: Host) -> Region:
        new: list[Op] = []
        for op in region.ops:
            weight = next((t for t in op.ins if t.name == EMBEDDING), None)
            if weight is None:
                new.append(op)
                continue
            b = Builder(host.numerics, f"{op.name}.")
            with b.marked(op.site, "down"):
                merged = self._merged(b, weight, host)
            ins = tuple(merged if t is weight else t for t in op.ins)
            new += (*b.ops, replace(op, ins=ins, part="down" if not isinstance(op, Embedding) else op.part))
        return replace(region, ops=tuple(new))

    def _merged(self, b: Builder, weight: Tensor, host: Host) -> Tensor:
        """W.index_copy(0, index, delta): keeps the index and the rows; the gradient's rows are selected."""
        shape = (len(self.token_indices), weight.shape[1])
        delta = Tensor("@trainable_tokens_delta", shape, host.new_dtype, ADAPTER, True)
        index = b.plain("token_index", shape[0], dtype=DType.int64)
        given = b.cast(delta, weight.dtype, label="token_delta")
        out = Tensor("", weight.shape, weight.dtype)
        grads = (Grad(given, given.logical_bytes),)
        return b.formula("merged", out, weight, given, index, keeps=(index, given), grads=grads)


METHOD = TrainableTokens
EXAMPLES = (TrainableTokens(token_indices=(1, 2)),)
UNVERIFIED: dict[str, str] = {}
