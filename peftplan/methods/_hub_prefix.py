"""AdapterHub's prefixes: keys and values that every layer puts before its own, made for the batch before the model.

Mirrors adapters/methods/prefix_tuning.py PrefixTuning, FlatPrefixTuning and PrefixTuningLayer, and
adapters/model_mixin.py forward_context, adapters 1.3.0: one pool makes the prefixes of all layers, and the context of
the forward holds them to its end, a checkpoint's function to the end of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.blocks.setup import Batch
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Graph, Op, Region, Tensor
from peftplan.graph.edit import modules
from peftplan.graph.ops import Embedding
from peftplan.methods._adapterhub import AdapterHub, check_non_linearity, gate, hooked, squeezed
from peftplan.methods._branches import check_share
from peftplan.methods.base import Family, Host
from peftplan.units import DType

PART = "self_attn.prefix"
"""What a layer takes of the prefixes: its keys and its values."""


@dataclass(frozen=True)
class Prefixes(AdapterHub):
    """adapters' PrefixTuningConfig, the knobs that change memory."""

    flat: bool = False
    prefix_length: int = 30
    bottleneck_size: int = 512
    non_linearity: str = "tanh"
    dropout: float = 0.0
    leave_out: tuple[int, ...] = ()
    use_gating: bool = False
    shared_gating: bool = True
    family: ClassVar[Family] = "soft prompt"
    base_config: ClassVar[str] = "prefix_tuning"

    def seen(self, batch: Batch) -> Batch:
        if batch.documents > 1:
            raise Unsupported("--batching packed behind a prefix is not modelled; use padded or exact")
        if self.prefix_length < 1:
            raise RequestError(f"method.prefix_length={self.prefix_length}: must be at least 1")
        return replace(batch, prefix=self.prefix_length, prefix_computed=not self.flat)

    def check(self, host: Host, dtype: DType) -> None:
        """Raises RequestError for what the library refuses, Unsupported for what is not modelled."""
        check_share("dropout", self.dropout)
        check_non_linearity(self.non_linearity)
        if hooked(host):
            raise RequestError(
                f"adapters 1.3.0 has no prefix tuning for {host.arch.family}, whose layers it only hooks into; "
                "use prefix_tuning, which is PEFT's"
            )
        if self.leave_out:
            raise Unsupported("method.leave_out of a prefix is not modelled; leave it out")
        if self.bottleneck_size < 1:
            raise RequestError(f"method.bottleneck_size={self.bottleneck_size}: must be at least 1")
        if self.flat and host.numerics.autocast is not None and dtype is not DType.float32:
            raise Unsupported("method.flat under autocast is modelled in float32 only; leave --adapter-dtype out")
        attention = host.arch.layers[0][0].attention
        if attention.head_dim != host.arch.hidden // attention.heads:
            raise RequestError(
                f"adapters takes hidden / heads for head_dim, which is {attention.head_dim} here; use prefix_tuning, "
                "which is PEFT's"
            )

    def adapt(self, graph: Graph, host: Host, dtype: DType) -> Graph:
        self.check(host, dtype)
        first, *rest = graph.regions
        b = Builder(host.numerics, "@prefix_tuning.")
        count, size = host.arch.num_layers, first.exit.shape[0]
        attention = host.arch.layers[0][0].attention
        shape = (2 * count, size, attention.kv_heads, self.prefix_length, attention.head_dim)
        width = 2 * count * attention.kv_heads * attention.head_dim
        make = self._stored if self.flat else self._computed
        values = b.dropout(make(b, size, width, host, dtype), self.dropout)
        states = Tensor("", shape, values.dtype, base=values.storage)
        own = () if values.storage.startswith("@prefix_tuning.") else (values.storage,)
        kept = (values,) if self.use_gating and own and not host.recomputes else ()
        past = b.formula("states", states, values, keeps=kept, grads=(Grad(values, values.logical_bytes),))
        if host.recomputes and own:
            b.keep(values)
        held = () if host.recomputes else own
        front = replace(first, ops=(*b.ops, *first.ops), held=(*first.held, *held), handed=(past.name,))
        layers = [self._gated(r, host, dtype) for r in rest] if self.use_gating else rest
        return replace(graph, regions=(front, *layers))

    def _stored(self, b: Builder, size: int, width: int, host: Host, dtype: DType) -> Tensor:
        """FlatPrefixTuning.forward: the weight, seen once for every row."""
        del host
        weight = b.weight("control_trans", self.prefix_length * width, dtype=dtype, kind=ADAPTER)
        rows = Tensor("", (size, self.prefix_length, width), dtype, base=weight.name)
        return b.formula("rows", rows, weight, grads=(Grad(weight, weight.logical_bytes),))

    def _computed(self, b: Builder, size: int, width: int, host: Host, dtype: DType) -> Tensor:
        """PrefixTuning.forward: every row of the batch goes through the two layers."""
        rows = () if b.numerics.backend == "cpu" else (size,)
        ids = b.plain("tokens", *rows, self.prefix_length, dtype=DType.int64)
        table = b.weight("wte.weight", self.prefix_length, host.arch.hidden, dtype=dtype, kind=ADAPTER)
        name = b.name("wte")
        embedded = Tensor(name, (size, self.prefix_length, host.arch.hidden), dtype)
        b.ops.append(Embedding(name=name, ins=(ids, table), out=embedded))
        inner = squeezed(b, _linear(b, embedded, self.bottleneck_size, "control_trans.0", dtype), self.non_linearity)
        values = _linear(b, inner, width, "control_trans.2", dtype)
        b.hold(embedded, ids)
        return values

    def _gated(self, region: Region, host: Host, dtype: DType) -> Region:
        """PrefixTuningLayer.compose_single: a number of each row for the keys, one for the values or the same."""
        at = next((i for i, op in enumerate(region.ops) if any(t.name == PART for t in op.ins)), None)
        if at is None:
            return region
        entered = next(m.x for _, _, m in modules(region) if m.site == "q")
        part = next(t for t in region.ops[at].ins if t.name == PART)
        own, batch = part.shape[1:], part.shape[1]
        b = Builder(host.numerics, "self_attn.prefix_tuning.")
        with b.marked("", "extra"):
            both = tuple(b.slice(part, *own, label=label)._replace(stored_bytes=0) for label in ("keys", "values"))
            opened = gate(b, entered, dtype, outputs=1 if self.shared_gating else 2)
            gates = tuple(b.slice(opened, batch, 1, 1, 1, label=f"{label}_gate") for label in ("key", "value"))
            made = tuple(b.mul(t, g, label="gated") for t, g in zip(both, gates, strict=True))
        tail: list[Op] = [_reading(op, t) for op, t in zip(region.ops[at : at + 2], made, strict=True)]
        held = Builder(host.numerics, "self_attn.prefix_tuning.")
        held.hold(*made, *gates)
        ops = (*region.ops[:at], *b.ops, *tail, *held.ops, *region.ops[at + 2 :])
        return replace(region, ops=ops)


def _reading(op: Op, part: Tensor) -> Op:
    """The concatenation, of `part` in place of what the layer takes."""
    return op.over((part, *op.ins[1:]), op.out)


def _linear(b: Builder, x: Tensor, width: int, label: str, dtype: DType) -> Tensor:
    weight = b.weight(f"{label}.weight", width, x.shape[-1], dtype=dtype, kind=ADAPTER)
    return b.linear(x, weight, b.weight(f"{label}.bias", width, dtype=dtype, kind=ADAPTER), label=label)
