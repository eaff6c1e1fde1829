"""Adapted linear layers as one function: what Unsloth made of LoRA, and fms-acceleration took over.

unsloth 2026.10.9, kernels/fast_lora.py, and fms-acceleration at 876e2ed, fused_ops/unsloth_lora/bnb/fast_lora.py:
LoRA_QKV, LoRA_W, LoRA_MLP. The packed weight is dequantized for each product, there and back; the input's gradient is
written over the input that the function kept (not by LoRA_W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from operator import is_
from typing import NamedTuple

from peftplan.graph.core import ADAPTER, PARAMS, WEIGHT, Grad, Graph, Op, Region, Tensor
from peftplan.graph.ops import BITSANDBYTES, Dropout, Further, Fused, PackedLinear, internal
from peftplan.units import DType

FP32 = DType.float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """What the two differ in."""

    keeps_dropped: bool
    """Whether inputs are kept as dropout left them, and the zeros in them looked for (fms-acceleration), or dropout's
    masks are kept and applied again (Unsloth)."""
    adds_in_place: bool
    """Whether the adapter's product is added by the multiplication itself, or is a tensor first."""
    holds_whole: bool
    """Whether the forward dequantizes into a buffer that stays."""
    products_back: tuple[int, int]
    """Products of a rank's width in one projection's backward: over the outputs, over the inputs."""


class Adapted(NamedTuple):
    """One projection with its adapter."""

    x: Tensor
    out: Tensor
    weight: Tensor
    a: Tensor
    up: Tensor
    packed: bool
    dropped: bool
    bnb: bool
    """Whether it is bitsandbytes' layer. On GPTQ's (fused_ops/unsloth_lora/gptq/fast_lora.py) all weights of a function
    are dequantized before anything is multiplied, and the input's gradient is a new tensor."""

    @property
    def rows(self) -> int:
        return self.x.numel // self.x.shape[-1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def whole_bytes(self) -> int:
        """The dequantized weight and its blocks' fp32 constants; nothing where it is not packed."""
        return self.weight.numel * self.x.dtype.size + self.weight.numel // 64 * 4 if self.packed else 0

    @property
    def forward_flops(self) -> int:
        wide = self.x.shape[-1] + self.out.shape[-1]
        return 2 * self.rows * (self.weight.shape[0] * self.weight.shape[1] + self.rank * wide)

    def backward_flops(self, style: Style) -> int:
        outs, ins = style.products_back
        adapter = self.rank * (outs * self.out.shape[-1] + ins * self.x.shape[-1])
        return 2 * self.rows * (self.weight.shape[0] * self.weight.shape[1] + adapter)

    @property
    def _inner_bytes(self) -> int:
        return self.rows * self.rank * self.x.dtype.size

    def forward_bytes(self, style: Style) -> int:
        """Temporaries besides the output: the whole weight, and after it the adapter's product."""
        product = 0 if style.adds_in_place else self.out.nbytes
        mask = self.x.numel if self.dropped and style.keeps_dropped else 0
        dropped = self.x.nbytes if self.dropped and not style.keeps_dropped else 0
        whole = 0 if style.holds_whole and not self.dropped else self.whole_bytes
        return dropped + max(whole, self._inner_bytes + max(product, mask))

    def input_bytes(self, style: Style) -> int:
        """Temporaries of the input's gradient: the whole weight with its product, then the adapter's."""
        product = self.x.nbytes
        if style.adds_in_place:
            replayed = 2 * product if self.dropped else 0
            return max(self.whole_bytes, replayed) + self._inner_bytes
        masked = self.x.numel + product if style.keeps_dropped else 0
        return max(self.whole_bytes + product, product + masked + self._inner_bytes)

    def adapter_grads(self) -> tuple[Grad, ...]:
        size = self.x.dtype.size
        return tuple(Grad(w, w.numel * size, self.rows * self.rank * size) for w in (self.a, self.up))


def fused(graph: Graph, style: Style, takes: Callable[[Adapted], bool]) -> Graph:
    """The graph with every layer's adapted projections in the functions that take them, where they do."""
    regions = tuple(_layer(r, style, takes) if r.first_index is not None else r for r in graph.regions)
    same = all(map(is_, regions, graph.regions))
    return graph if same else replace(graph, regions=regions)


def _layer(region: Region, style: Style, takes: Callable[[Adapted], bool]) -> Region:
    ops = region.ops
    for sites in (("q", "k", "v"), ("o",), ("gate", "up", "down")):
        found = [one for site in sites if (one := adapted(ops, site)) is not None]
        if len(found) == len(sites) and all(map(takes, found)):
            ops = _in_place_of(ops, sites, found, style)
    return region if ops is region.ops else replace(region, ops=ops)


def adapted(ops: Iterable[Op], site: str) -> Adapted | None:
    """The projection of a site, if it has one adapter, which is plain LoRA."""
    mine = [op for op in ops if op.site == site]
    added = _weights(mine, ADAPTER)
    bases = [op for op in mine if op.part == "base" and len(op.ins) > 1]
    trains = any(t.trainable for op in mine for t in op.ins if t.kind == WEIGHT)
    if len(added) != 2 or not bases or trains or any(len(w.shape) != 2 for w in added):
        return None
    base = bases[0]
    weight = next(t for t in base.ins if t.kind in PARAMS and len(t.shape) == 2)
    x = next(t for t in base.ins if not t.is_param)
    return Adapted(
        x=x, out=_last(mine), weight=weight, a=added[0], up=added[1], packed=isinstance(base, PackedLinear),
        dropped=any(isinstance(op, Dropout) for op in mine),
        bnb=not isinstance(base, PackedLinear) or base.layer == BITSANDBYTES,
    )  # fmt: skip


def _weights(ops: Iterable[Op], kind: str) -> list[Tensor]:
    return list({t.name: t for op in ops for t in op.ins if t.kind == kind}.values())


def _last(ops: list[Op]) -> Tensor:
    return next(op.out for op in reversed(ops) if op.out.nbytes)


def _in_place_of(ops: tuple[Op, ...], sites: tuple[str, ...], found: list[Adapted], style: Style) -> tuple[Op, ...]:
    make = {3: _qkv, 1: _single}[len(sites)] if sites[0] != "gate" else _mlp
    numbers = [i for i, op in enumerate(ops) if op.site in sites]
    start = numbers[0]
    between = range(start, numbers[-1] + 1)
    within = sites[0] == "gate"  # and so does what lies between gate and down
    rest = () if within else (op for i, op in enumerate(ops) if i in between and op.site not in sites)
    return (*ops[:start], *make(found, style), *rest, *ops[numbers[-1] + 1 :])


def _qkv(found: list[Adapted], style: Style) -> Iterator[Op]:
    """LoRA_QKV: three outputs."""
    *firsts, last = found
    x, x_over = last.x, all(one.bnb for one in found)
    ins = (x, *(t for one in found for t in (one.weight, one.a, one.up)))
    yield from (Further(name=one.out.name, ins=ins, out=one.out, site="q", part="extra") for one in firsts)
    dropped = _dropped(found, style)
    scratch = max(one.input_bytes(style) for one in found)
    highest = _stages(found, [t.nbytes for t in dropped], style)
    if not x_over:
        highest += sum(one.whole_bytes for one in found) - max(one.whole_bytes for one in found)
    yield Fused(
        name=last.out.name,
        ins=ins,
        out=last.out,
        keeps=(x, *dropped),
        grads=(*(g for one in found for g in one.adapter_grads()), Grad(x, x.nbytes, scratch, x if x_over else None)),
        also=tuple(one.out for one in firsts),
        temporary_bytes=highest,
        forward_flops=sum(one.forward_flops for one in found),
        backward_flops=sum(one.backward_flops(style) for one in found),
        site="q",
        part="extra",
    )


def _stages(found: list[Adapted], dropped: list[int], style: Style) -> int:
    """The most that projections, one after the other, take at once beyond all of their outputs."""
    so_far, highest = 0, 0
    for n, one in enumerate(found):
        so_far += one.out.nbytes + (dropped[n] if dropped else 0)
        highest = max(highest, so_far + one.forward_bytes(style))
    return max(highest - sum(one.out.nbytes for one in found), sum(dropped))


def _dropped(found: list[Adapted], style: Style) -> tuple[Tensor, ...]:
    """The inputs as dropout left them, or its masks, where there is any."""

    def kept(one: Adapted) -> Tensor:
        return internal(one.out.name, "dropped", one.x.shape, one.x.dtype if style.keeps_dropped else DType.boolean)

    return tuple(kept(one) for one in found if one.dropped)


def _single(found: list[Adapted], style: Style) -> Iterator[Op]:
    """LoRA_W: the input's gradient is a new tensor."""
    (one,) = found
    dropped = _dropped(found, style)
    yield Fused(
        name=one.out.name,
        ins=(one.x, one.weight, one.a, one.up),
        out=one.out,
        keeps=(one.x, *dropped),
        grads=(*one.adapter_grads(), Grad(one.x, one.x.nbytes, one.input_bytes(style))),
        temporary_bytes=_stages(found, [t.nbytes for t in dropped], style),
        forward_flops=one.forward_flops,
        backward_flops=one.backward_flops(style),
        site="o",
        part="extra",
    )


def _mlp(found: list[Adapted], style: Style) -> Iterator[Op]:
    """LoRA_MLP: keeps what goes in and both factors of the product; the product is computed again over its gradient."""
    gate, up, down = found
    again = replace(style, products_back=(3, 3))  # its gradient times B is computed twice
    x, product = gate.x, down.x
    factors = tuple(internal(down.out.name, label, product.shape, product.dtype) for label in ("e", "g"))
    dropped = _dropped(found, style)
    kept = sum(t.nbytes for t in (*factors, *dropped))
    ahead = product.nbytes + down.forward_bytes(style)
    masked = product.numel if style.keeps_dropped else 0  # where the dropped product is not zero
    added = 0 if style.adds_in_place else product.nbytes + masked
    at_product = max(0 if style.holds_whole else down.whole_bytes, added)
    scratch = product.nbytes + max(at_product - x.nbytes, gate.input_bytes(style), up.input_bytes(style))
    yield Fused(
        name=down.out.name,
        ins=(x, *(t for one in found for t in (one.weight, one.a, one.up))),
        out=down.out,
        keeps=(x, *factors, *dropped),
        grads=(*(g for one in found for g in one.adapter_grads()), Grad(x, x.nbytes, scratch, x)),
        temporary_bytes=kept + max(ahead, gate.forward_bytes(style)),
        forward_flops=sum(one.forward_flops for one in found),
        backward_flops=sum(one.backward_flops(style) for one in (gate, up)) + down.backward_flops(again),
        site="down",
        part="extra",
    )
