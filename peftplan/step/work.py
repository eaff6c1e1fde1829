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
from peftplan.graph.ops import Add, FusedAttention, PackedLinear
from peftplan.step.memory import Segment
from peftplan.units import DType


class Kernel(NamedTuple):
    """`flops` as the op counts them: an attention's whole score matrix, causal or not."""

    dtype: DType
    flops: int
    moved_bytes: int
    launches: int
    attention: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One of `forward`, `recompute`, `backward` over a region, run `count` times in a micro-batch."""

    name: str
    count: int
    products: tuple[Kernel, ...]
    """The kernels that compute matrix products."""
    plain_bytes: int
    """Moved by all other kernels."""
    beyond_cache_bytes: int
    """The part of `plain_bytes` that no cache can spare: each kernel's bytes beyond the cache's."""
    launches: int


def passes(segments: Iterable[Segment], *, reentrant: bool, cache_bytes: int) -> list[Pass]:
    """What one micro-batch runs, once per distinct region."""
    found: list[Pass] = []
    known: dict[int, list[Kernel | None]] = {}
    for part in segments:
        region, need = part.region, part.walk.need
        ahead = known.get(id(region))
        if ahead is None:
            ahead = known[id(region)] = [_forward(op) for op in region.ops]
        found.append(_pass("forward", part.count, ahead, cache_bytes))
        if part.checkpointed:
            again = ahead[: part.walk.recomputed_ops(stop_early=not reentrant)]
            found.append(_pass("recompute", part.count, again, cache_bytes))
        back = [_backward(op, k, need) for op, k in zip(region.ops, ahead, strict=True)]
        found.append(_pass("backward", part.count, back, cache_bytes))
    return found


def _pass(name: str, count: int, kernels: Sequence[Kernel | None], cache_bytes: int) -> Pass:
    products: list[Kernel] = []
    plain = beyond = launches = 0
    for k in kernels:
        if k is None:
            continue
        launches += k.launches
        if k.flops:
            products.append(k)
        else:
            plain += k.moved_bytes
            if k.moved_bytes > cache_bytes:
                beyond += k.moved_bytes - cache_bytes
    return Pass(
        name=name,
        count=count,
        products=tuple(products),
        plain_bytes=plain,
        beyond_cache_bytes=beyond,
        launches=launches,
    )


def _forward(op: Op) -> Kernel | None:
    """None where nothing runs: views, names going out of scope. The unpacked copy of a weight is written
    and read."""
    moved = op.moved_bytes()
    if not moved:
        return None
    dtype = op.ins[0].dtype if op.ins else op.out.dtype
    if type(op) is PackedLinear:  # ops are final; an abstract class's isinstance is slow
        return Kernel(dtype, op.flops(), moved + 2 * op.forward_workspace_bytes, 2)
    return Kernel(dtype, op.flops(), moved, 1, type(op) is FusedAttention)


def _backward(op: Op, ahead: Kernel | None, need: Need) -> Kernel | None:
    if ahead is None or op.out.name not in need:
        return None
    dtype, flops, moved, launches, attention = ahead
    if not flops:
        times = 1 if type(op) is Add else 2
        return Kernel(dtype, 0, times * moved, times)
    back = op.grad_flops(need)
    times = 2 if attention else round(back / flops)
    return Kernel(dtype, back, times * moved, times * launches, attention)
