"""Bottleneck adapters: down, a non-linearity and up, put into every layer after attention, the feed-forward, or both.

Mirrors adapters/methods/bottleneck.py BottleneckLayer and adapters/methods/modeling.py Adapter and ParallelAdapter,
adapters 1.3.0. The norms that its layers look for come after a sublayer; the decoders here have theirs before it, so
`layer_norm` is None throughout.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Graph, Op, Region, Tensor
from peftplan.graph.edit import Module, Rewriter, rewrite, split_runs, writing
from peftplan.methods._adapterhub import AdapterHub, check_left_out, check_non_linearity, gate, hooked, squeezed
from peftplan.methods._branches import check_share
from peftplan.methods._invertible import Coupling
from peftplan.methods.base import Host
from peftplan.units import DType

Factor = float | dict[str, float]


class Place(NamedTuple):
    """Where in a layer adapters sit."""

    knob: str
    module: str
    site: str
    """The projection whose output they take."""
    total: str
    """The op that adds that output to the hidden states."""


PLACES = (
    Place("mh_adapter", "attention_adapters", "o", "residual_attn"),
    Place("output_adapter", "output_adapters", "down", "residual_mlp"),
)


@dataclass(frozen=True)
class Bottleneck(AdapterHub, ABC):
    """adapters' BnConfig, the knobs that change memory."""

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: Factor = 16
    non_linearity: str = "relu"
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | Literal["post_add"] = True
    adapter_residual_before_ln: bool = False
    scaling: float | Literal["learned", "channel"] = 1.0
    is_parallel: bool = False
    dropout: float = 0.0
    use_gating: bool = False
    leave_out: tuple[int, ...] = ()
    inv_adapter: Literal["nice", "glow"] | None = None
    inv_adapter_reduction_factor: float | None = None
    adapters_train: ClassVar[bool] = True
    """Whether the adapters themselves train."""

    # -- what is asked ------------------------------------------------------------------------------------------

    def check(self, host: Host) -> None:
        """Raises RequestError for what the library refuses, Unsupported for what is not modelled."""
        check_share("dropout", self.dropout)
        if not self.mh_adapter and not self.output_adapter:
            raise RequestError("method.output_adapter=false and mh_adapter=false: nothing trains; set one of them")
        check_non_linearity(self.non_linearity)
        if self.residual_before_ln == "post_add" and not self.is_parallel:
            raise RequestError(
                "method.residual_before_ln=post_add: adapters takes it only from a norm after the sublayer, which "
                f"{host.arch.family} does not have; use true or false"
            )
        if hooked(host) and not self.original_ln_after:
            raise RequestError(
                f"method.original_ln_after=false: adapters cannot leave out the residual of {host.arch.family}'s own "
                "layers; use true"
            )

    def width(self, hidden: int, index: int) -> int:
        """The width of the bottleneck in a layer."""
        factor = self.reduction_factor
        if isinstance(factor, dict):
            if str(index) not in factor and "default" not in factor:
                raise RequestError(f"method.reduction_factor names neither layer {index} nor a default; add a default")
            factor = factor[str(index)] if str(index) in factor else factor["default"]
        if factor <= 0:
            raise RequestError(f"method.reduction_factor={factor}: must be above 0")
        return max(1, int(hidden // factor))

    # -- where they sit -----------------------------------------------------------------------------------------

    def adapt(self, graph: Graph, host: Host, dtype: DType) -> Graph:
        self.check(host)
        hidden = host.arch.hidden
        check_left_out(self.leave_out, host)

        def width(index: int) -> int | None:
            return None if index in self.leave_out else self.width(hidden, index)

        split = split_runs(graph, width)
        adapted = replace(split, regions=tuple(self._region(r, width, host, dtype) for r in split.regions))
        coupling = self._coupling(dtype)
        return adapted if coupling is None else coupling.put(adapted, host)

    def _coupling(self, dtype: DType) -> Coupling | None:
        """The invertible adapter after the embedding."""
        if self.inv_adapter is None:
            return None
        if self.inv_adapter != "nice":
            raise Unsupported(f"method.inv_adapter={self.inv_adapter} is not modelled; use nice")
        if self.inv_adapter_reduction_factor is None:
            raise RequestError("method.inv_adapter needs method.inv_adapter_reduction_factor; 2 is adapters' own")
        return Coupling(factor=self.inv_adapter_reduction_factor, activation=self._squeezed, dtype=dtype)

    def _region(self, region: Region, width: Callable[[int], int | None], host: Host, dtype: DType) -> Region:
        size = None if region.first_index is None else width(region.first_index)
        if size is None:
            return region
        for place in PLACES:
            if self.knob(place.knob):
                put = _into_hook if hooked(host) else _into_layer
                region = put(region, place, Inside(self, size, dtype, host))
        return region

    # -- what they do -------------------------------------------------------------------------------------------

    def run(self, b: Builder, hidden: Tensor, before: Tensor, inside: Inside) -> Tensor:
        """BottleneckLayer.bottleneck_layer_forward: `hidden` out of the sublayer, `before` what it was added to."""
        x, residual = (before, None) if self.is_parallel else self.entered(b, hidden, before)
        up, out = self.adapter(b, x, residual, inside)
        total = b.add(out, hidden, label="around") if self.is_parallel else out
        if self.original_ln_after and not hooked(inside.host):
            result = b.add(total, before, label="sum")
            b.hold(total, out)
        else:
            result = total
        b.hold(hidden, before, up)
        return result

    def entered(self, b: Builder, hidden: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Adapter.pre_forward."""
        x = b.add(hidden, before, label="entry") if self.original_ln_before else hidden
        return x, hidden if self.residual_before_ln else x

    def adapter(
        self, b: Builder, x: Tensor, residual: Tensor | None, inside: Inside, *, name: str = "trained"
    ) -> tuple[Tensor, Tensor]:
        """Adapter.forward: the scaled way up, and with what it is added to."""
        with b.scope(f"adapters.{name}"):
            down = self._squeezed(b, self.project(b, x, inside.size, "adapter_down.0", inside.dtype))
            up = self._scaled(b, self.project(b, down, x.shape[-1], "adapter_up", inside.dtype), inside.dtype)
            out = self._gated(b, b.dropout(up, self.dropout), x, inside.dtype)
            summed = out if residual is None else b.add(out, residual, label="residual")
            b.hold(down, up, x)
        return up, summed

    def _gated(self, b: Builder, up: Tensor, x: Tensor, dtype: DType) -> Tensor:
        return b.mul(up, gate(b, x, dtype), label="gated") if self.use_gating else up

    def project(self, b: Builder, x: Tensor, width: int, label: str, dtype: DType) -> Tensor:
        """One of the two projections."""
        weight = self.new(b, f"{label}.weight", width, x.shape[-1], dtype=dtype)
        return b.linear(x, weight, self.new(b, f"{label}.bias", width, dtype=dtype), label=label)

    def new(self, b: Builder, label: str, *shape: int, dtype: DType) -> Tensor:
        """A parameter of an adapter."""
        return b.weight(label, *shape, dtype=dtype, kind=ADAPTER)._replace(trainable=self.adapters_train)

    def _squeezed(self, b: Builder, x: Tensor) -> Tensor:
        return squeezed(b, x, self.non_linearity)

    def _scaled(self, b: Builder, up: Tensor, dtype: DType) -> Tensor:
        if not isinstance(self.scaling, str):
            return b.scale(up, label="scaled")
        size = up.shape[-1] if self.scaling == "channel" else 1
        return b.mul(up, self.new(b, "scaling", size, dtype=dtype), label="scaled")


class Inside(NamedTuple):
    """An adapter of one layer."""

    method: Bottleneck
    size: int
    dtype: DType
    host: Host

    def ops(self, place: Place, hidden: Tensor, before: Tensor, out: Tensor, *held: Tensor) -> tuple[Op, ...]:
        """From a sublayer's output to the value `out`."""
        b = Builder(self.host.numerics, f"{place.module}.")
        with b.marked("", "extra"):
            result = self.method.run(b, hidden, before, self)
            b.hold(*held)
        if result.dtype is not out.dtype:
            raise Unsupported(
                f"adapters' {self.method.base_config} makes hidden states {result.dtype.label} in place of "
                f"{out.dtype.label} here, which is not modelled; leave autocast or method.scaling out"
            )
        return writing(b.ops, result, out)


def _into_layer(region: Region, place: Place, inside: Inside) -> Region:
    """LlamaDecoderLayerWithAdapters.forward: the adapter layer adds the residual itself."""
    at = next(i for i, op in enumerate(region.ops) if op.name == place.total)
    total = region.ops[at]
    before, hidden = total.ins
    ops = inside.ops(place, hidden, before, total.out)
    return replace(region, ops=(*region.ops[:at], *ops, *region.ops[at + 1 :]))


def _into_hook(region: Region, place: Place, inside: Inside) -> Region:
    """bottleneck.hook_fn: what the projection returns goes through the adapter, then on to the layer's own sum."""
    before = next(op for op in region.ops if op.name == place.total).ins[0]

    def hook(module: Module) -> tuple[Op, ...]:
        base = module.out._replace(name=f"{module.out.name}.base")
        own = writing(module.ops, module.out, base)
        return (*own, *inside.ops(place, base, before, module.out, module.x))

    def choose(module: Module) -> Rewriter | None:
        return hook if module.site == place.site else None

    return rewrite(region, choose)
