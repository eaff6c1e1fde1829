"""Invertible adapters: a coupling that changes embeddings, and where adapters hooks in, back before the head.

Mirrors adapters/methods/invertible.py InvertibleAdapterLayer and adapters/methods/modeling.py NICECouplingBlock
(Dinh 2015, arXiv:1410.8516), adapters 1.3.0, which has the way back only for models that it hooks into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Graph, Op, Region, Tensor
from peftplan.graph.ops import Embedding
from peftplan.methods._adapterhub import hooked
from peftplan.methods.base import Host
from peftplan.units import DType

Activation = Callable[[Builder, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Coupling:
    """A NICE block over hidden states, half of which is changed by a small network of the other half."""

    factor: float
    activation: Activation
    dtype: DType

    def put(self, graph: Graph, host: Host) -> Graph:
        """The graph with it after the embedding, and its inverse before the head. Raises RequestError."""
        if self.factor <= 0:
            raise RequestError(f"method.inv_adapter_reduction_factor={self.factor}: must be above 0")
        first, *rest, last = graph.regions
        regions = (self._after_embedding(first, host), *rest, self._before_head(last, host) if hooked(host) else last)
        return replace(graph, regions=regions)

    def _after_embedding(self, region: Region, host: Host) -> Region:
        at = next(i for i, op in enumerate(region.ops) if isinstance(op, Embedding)) + 1
        b = Builder(host.numerics, "invertible.")
        x = region.exit
        left, right = self._halves(b, x)
        y1 = b.add(left.half, self._network(b, "F", right.half, left.width), label="y1")
        y2 = b.add(right.half, self._network(b, "G", y1, right.width), label="y2")
        out = self._joined(b, x, y1, y2)
        return replace(region, ops=(*region.ops[:at], *b.ops, *region.ops[at:]), exit=out)

    def _before_head(self, region: Region, host: Host) -> Region:
        at = next(i for i, op in enumerate(region.ops) if op.site == "head")
        b = Builder(host.numerics, "inverse.")
        x = region.entry or region.exit
        left, right = self._halves(b, x)
        y2 = b.minus(right.half, self._network(b, "G", left.half, right.width), label="y2")
        y1 = b.minus(left.half, self._network(b, "F", y2, left.width), label="y1")
        out = self._joined(b, x, y1, y2)

        def fed(op: Op) -> Op:
            return op.over(tuple(out if t.name == x.name else t for t in op.ins), op.out) if op.site == "head" else op

        return replace(region, ops=(*region.ops[:at], *b.ops, *map(fed, region.ops[at:])))

    @staticmethod
    def _halves(b: Builder, x: Tensor) -> tuple[Half, Half]:
        wide = x.shape[-1]
        return tuple(  # type: ignore[return-value]
            Half(b.slice(x, *x.shape[:-1], width, label=label), width)
            for label, width in (("x1", wide // 2), ("x2", wide - wide // 2))
        )

    def _network(self, b: Builder, label: str, x: Tensor, width: int) -> Tensor:
        """Two linear layers: the first one of a half, which lies apart in memory, adds its bias by itself."""
        wide = x.shape[-1]
        inner = int(wide // self.factor)
        if inner < 1:
            raise RequestError(f"method.inv_adapter_reduction_factor={self.factor} leaves nothing of {wide}; lower it")
        if x.base:
            bias = b.autocast(self._new(f"{label}.0.bias", inner))
            h = b.add_into(b.linear(x, self._new(f"{label}.0.weight", inner, wide), label=f"{label}.0"), bias)
        else:
            weight = self._new(f"{label}.0.weight", inner, wide)
            h = b.linear(x, weight, self._new(f"{label}.0.bias", inner), label=f"{label}.0")
        weight = self._new(f"{label}.2.weight", width, inner)
        return b.linear(self.activation(b, h), weight, self._new(f"{label}.2.bias", width), label=f"{label}.2")

    def _new(self, label: str, *shape: int) -> Tensor:
        return Tensor(f"@invertible_adapters.trained.{label}", shape, self.dtype, ADAPTER, trainable=True)

    @staticmethod
    def _joined(b: Builder, x: Tensor, y1: Tensor, y2: Tensor) -> Tensor:
        out = b.concat((y1, y2), *x.shape, label="joined")
        b.hold(x, y1, y2)
        if out.dtype is not x.dtype:
            raise Unsupported(
                f"invertible adapters make embeddings {out.dtype.label} in place of {x.dtype.label} here, which is not "
                "modelled; leave autocast or method.inv_adapter out"
            )
        return out


class Half(NamedTuple):
    """A part of the hidden states' width."""

    half: Tensor
    width: int
