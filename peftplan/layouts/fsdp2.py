"""FSDP2 (torch.distributed.fsdp.fully_shard; Zhao 2023, arXiv:2304.11277, for the idea): every parameter sharded along
its first dimension, gathered layer by layer.

Mirrors torch 2.13, torch/distributed/fsdp/_fully_shard. A shard is `ceil(rows / ranks)` rows, padding included
(_fsdp_param.py, _init_sharded_param); the first rank holds most. Gathering a unit (_fsdp_collectives.py): the shards
are cast to `param_dtype` in one flat copy, which dies when it is in the gathered buffer, which in turn is copied out to
whole parameters; in forward the buffer lives until the next unit's copy-out, in backward it goes at once, and the unit
that ran before is gathered ahead, up to its copy-out. The root is gathered before all and stays so to the end
of backward. After a unit's backward the whole parameters go, then its whole gradients become one buffer of
`reduce_dtype`, which is held until the next unit is that far, and of whose reduced part the gradients are views.
In groups that hold copies the reduced part is kept in `reduce_dtype` until backward is done.

Parameters are gathered in units: the decoder's layers, and the rest with the root. accelerate 1.15 (`ends` = apart)
makes the embedding a unit of its own and norm and head another, which stays gathered after forward; tied, they are
one unit with the embedding. Quantized weights shard where a floating dtype packs them (`format.quant_storage`); packed
in uint8 they stay whole, as accelerate leaves them out. Their constants are whole always.

Not modelled: explicit prefetching, mixed-precision casts of inputs between units, CPU offload.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from peftplan.layouts._sharded import Sharded
from peftplan.layouts.base import Layout
from peftplan.layouts.units import Ledger, Piece, Schedule, Unit, Whole
from peftplan.units import ceil_div

_BUFFER, _CAST, _REDUCED, _PART = "@@gather/buffer", "@@gather/cast", "@@reduce_scatter", "@@reduce/part"


@final
@dataclass(frozen=True)
class Fsdp2(Sharded):
    ends: Literal["root", "apart"] = "root"

    def shard(self, piece: Piece, layout: Layout) -> tuple[int, ...]:
        """The fullest rank's part, padding included."""
        rows, *rest = piece.shape
        return (ceil_div(rows, layout.shards), *rest)

    def schedule(self, units: Sequence[tuple[Unit, int]], layout: Layout, *, adds: bool) -> Schedule:
        return _Run(self, units[-1][0], layout, adds=adds)


class _Run(Schedule):
    def __init__(self, style: Fsdp2, root: Unit, layout: Layout, *, adds: bool) -> None:
        self.style, self.root, self.layout = style, root, layout
        self.adds = adds
        self.whole: set[str] = set()
        """Units whose parameters are gathered and stay so."""
        self.ahead: str | None = None
        """The unit whose buffer is filled, and not yet copied out."""
        self.buffers: deque[int] = deque()
        self.reducing: deque[int] = deque()
        self.parts: list[int] = []
        self.late: list[tuple[Unit, Whole]] = []

    # -- gathering ----------------------------------------------------------------------------------------------

    def _fill(self, unit: Unit, ledger: Ledger) -> None:
        """foreach_all_gather."""
        pieces = list(unit.sharded)
        if not pieces:
            return
        layout, style = self.layout, self.style
        cast = sum(style.whole_bytes(p, layout, p.gathered) for p in pieces if p.held is not p.gathered)
        if cast:
            ledger.alloc(cast // layout.shards, "all_gather", _CAST)
        size = sum(style.whole_bytes(p, layout, p.gathered) for p in pieces)
        ledger.alloc(size, "all_gather", _BUFFER)
        if cast:
            ledger.free(cast // layout.shards, _CAST)
        self.buffers.append(size)

    def _copy_out(self, unit: Unit, ledger: Ledger) -> None:
        for p in unit.sharded:
            ledger.alloc(self.style.whole_bytes(p, self.layout, p.gathered), "unshard", f"@@{unit.name} weights")

    def _drop_buffer(self, ledger: Ledger) -> None:
        if self.buffers:
            ledger.free(self.buffers.popleft(), _BUFFER)

    def _reshard(self, unit: Unit, ledger: Ledger) -> None:
        for p in unit.sharded:
            ledger.free(self.style.whole_bytes(p, self.layout, p.gathered), f"@@{unit.name} weights")

    def _gather(self, unit: Unit, ledger: Ledger) -> None:
        """pre_forward; the buffer before goes when this one is there."""
        before = len(self.buffers)
        self._fill(unit, ledger)
        if before and len(self.buffers) > before:
            self._drop_buffer(ledger)
        self._copy_out(unit, ledger)

    def begin(self, ledger: Ledger) -> None:
        self._gather(self.root, ledger)

    def enter(self, unit: Unit, ledger: Ledger) -> None:
        self._gather(unit, ledger)

    def leave(self, unit: Unit, ledger: Ledger) -> None:
        if self._stays(unit):
            self.whole.add(unit.name)
        else:
            self._reshard(unit, ledger)

    def _stays(self, unit: Unit) -> bool:
        return not self.style.reshard_after_forward or unit.name == "tail"

    def end(self, ledger: Ledger) -> None:
        self._drop_buffer(ledger)

    # -- backward -----------------------------------------------------------------------------------------------

    def _prefetch(self, unit: Unit | None, ledger: Ledger) -> None:
        if unit is not None and unit.name not in self.whole:
            self._fill(unit, ledger)
            self.ahead = unit.name if self.buffers else None

    def begin_backward(self, last: Unit, ledger: Ledger) -> None:
        self._prefetch(last, ledger)

    def enter_backward(self, unit: Unit, before: Unit | None, ledger: Ledger) -> None:
        if unit.name not in self.whole:
            if self.ahead != unit.name:
                self._fill(unit, ledger)
            self._copy_out(unit, ledger)
            self._drop_buffer(ledger)
        self.ahead = None
        self._prefetch(before, ledger)

    def leave_backward(self, unit: Unit, gradients: Whole, ledger: Ledger, *, late: bool) -> None:
        if late:
            self.late.append((unit, gradients))
            return
        self._reshard(unit, ledger)
        self._reduce(unit, gradients, ledger)

    def _reduce(self, unit: Unit, gradients: Whole, ledger: Ledger) -> None:
        """foreach_reduce."""
        while self.reducing:
            ledger.free(self.reducing.popleft(), _REDUCED)
        pieces = [p for p in unit.sharded if p.trainable]
        if not pieces:
            return
        style, layout = self.style, self.layout
        size = sum(style.whole_bytes(p, layout, style.reduced(p)) for p in pieces)
        ledger.alloc(size, "reduce_scatter", _REDUCED)
        self.reducing.append(size)
        ledger.drop(gradients)
        part, kept = size // layout.shards, sum(self.style.held_bytes(p, layout)[0] for p in pieces)
        same = all(style.reduced(p) is p.held for p in pieces)
        if same and not self.adds:
            ledger.keep([part])
            return
        ledger.alloc(part, "reduce_scatter", _PART)
        if self.adds and not same:
            ledger.alloc(kept, "reduce_scatter", _CAST)
            ledger.free(kept, _CAST)
        elif not self.adds:
            ledger.keep([kept])
        if layout.replicates > 1:
            self.parts += [part] * self.times
        else:
            ledger.free(part, _PART)

    def end_backward(self, gradients: Whole, ledger: Ledger) -> None:
        self._reshard(self.root, ledger)
        self._reduce(self.root, gradients, ledger)
        for unit, its in self.late:
            self._reshard(unit, ledger)
            self._reduce(unit, its, ledger)
        for size in self.parts:
            ledger.free(size, _PART)
        while self.reducing:
            ledger.free(self.reducing.popleft(), _REDUCED)
        while self.buffers:
            self._drop_buffer(ledger)


STYLE = Fsdp2
VARIANTS: dict[str, dict[str, Any]] = {}
