"""How much work a pass over a region is: what its matrix products compute, by element type, and the bytes
it moves.

One op is one kernel in forward. Backward is one product of the forward's size per gradient for matrix
products, and twice the forward's bytes for the rest, which reads the incoming gradient besides: errs high
where a gradient is handed on without a copy or a cache still holds it, low where a formula makes
temporaries. A sum's backward moves nothing by itself, but a value used twice has its two gradients added:
the forward's bytes once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from peftplan.graph.core import Need, Op
from peftplan.graph.ops import Add, Float8Linear, FusedAttention, PackedLinear
from peftplan.step.segments import Segment
from peftplan.units import DType

FLOAT8_CASTING = 33
"""Bytes moved for each element that is cast to float8 without torch.compile, from two bytes an element: its absolute
value made and reduced (6), then fp32 (6), scaled (8), clamped (8), cast (5)."""


class Kernel(NamedTuple):
    """A matrix product; `flops` as the op counts them: an attention's whole score matrix, causal or not."""

    dtype: DType
    flops: int
    moved_bytes: int
    launches: int
    attention: bool = False


Ran = Kernel | int
"""What an op runs: a matrix product, or a kernel of which only the bytes it moves count (0: nothing runs)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One of `forward`, `recompute`, `backward`, `offload` over a region, run `count` times in a micro-batch."""

    name: str
    count: int
    products: tuple[Kernel, ...]
    plain_bytes: int
    """Moved by all kernels that are no matrix products."""
    beyond_cache_bytes: int
    """The part of `plain_bytes` that no cache can spare: each kernel's bytes beyond the cache's."""
    launches: int
    host_bytes: int = 0
    """Copied to the host and back."""
    beside: bool = False
    """Whether that happens on a stream of its own."""

    @property
    def flops(self) -> int:
        """Of all `count` times together."""
        return self.count * sum(k.flops for k in self.products)


def passes(segments: Iterable[Segment], *, cache_bytes: int | None = None, forwards: int = 1) -> list[Pass]:
    """What one micro-batch runs, once per distinct region, forward as often as `forwards`. Without `cache_bytes`,
    nothing is beyond the cache."""
    cache = cache_bytes if cache_bytes is not None else 2**62
    found: list[Pass] = []
    known: dict[int, list[Ran]] = {}
    for part in segments:
        region = part.region
        ahead = known.get(id(region))
        if ahead is None:
            ahead = known[id(region)] = [_forward(op) for op in region.ops]
        found.append(_forward_pass("forward", forwards * part.count, ahead, cache))
        if part.checkpointed:
            again = [ahead[i] for i in part.walk.recomputed_ops()]
            found.append(_forward_pass("recompute", part.count, again, cache))
        found.append(_backward_pass(part, ahead, cache))
        if sent := part.walk.sent:
            found.append(_offload_pass(part.count, [s.bytes for s in sent], beside=part.walk.beside))
    return found


def _forward_pass(name: str, count: int, ran: Sequence[Ran], cache: int) -> Pass:
    products = [k for k in ran if isinstance(k, Kernel)]
    plain = [k for k in ran if k and not isinstance(k, Kernel)]
    return Pass(
        name=name,
        count=count,
        products=tuple(products),
        plain_bytes=sum(plain),
        beyond_cache_bytes=sum(k - cache for k in plain if k > cache),
        launches=len(plain) + sum(k.launches for k in products),
    )


def _offload_pass(count: int, sizes: Sequence[int], *, beside: bool) -> Pass:
    """Each of them goes to the host in forward and comes back in backward."""
    return Pass(
        name="offload", count=count, products=(), plain_bytes=0, beyond_cache_bytes=0, launches=2 * len(sizes),
        host_bytes=2 * sum(sizes), beside=beside,
    )  # fmt: skip


def _forward(op: Op) -> Ran:
    """Nothing where views are made or names go out of scope. The unpacked copy of a weight is written and read."""
    moved = op.moved_bytes()
    flops = op.flops() if moved else 0
    if not flops:
        return moved
    if type(op) is Float8Linear:
        return Kernel(DType.float8, flops, moved + FLOAT8_CASTING * (op.ins[0].numel + op.ins[1].numel), 12)
    dtype = op.ins[0].dtype
    if type(op) is PackedLinear:
        return Kernel(dtype, flops, moved + 2 * op.forward_workspace_bytes, 2)
    return Kernel(dtype, flops, moved, 1, type(op) is FusedAttention)


def _backward_pass(part: Segment, ahead: Sequence[Ran], cache: int) -> Pass:
    need = part.walk.need
    products: list[Kernel] = []
    plain = beyond = launches = 0
    for op, ran in zip(part.region.ops, ahead, strict=True):
        if op.out.name not in need or not (ran or op.multiplies_back):
            continue
        if isinstance(ran, Kernel):
            product = _backward_product(op, ran, need)
            launches += product.launches
            if product.flops:
                products.append(product)
        elif back := op.grad_flops(need):  # products that only the backward has
            launches += 2
            products.append(Kernel(op.ins[0].dtype, back, 2 * ran, 2))
        else:
            times = 1 if type(op) is Add else 2
            launches += times
            plain += times * ran
            beyond += max(0, times * ran - cache)
    return Pass(
        name="backward",
        count=part.count,
        products=tuple(products),
        plain_bytes=plain,
        beyond_cache_bytes=beyond,
        launches=launches,
    )


def _backward_product(op: Op, ahead: Kernel, need: Need) -> Kernel:
    dtype, flops, moved, launches, attention = ahead
    back = op.grad_flops(need)
    times = 2 if attention else round(back / flops)
    return Kernel(dtype, back, times * moved, times * launches, attention)
