"""ZeRO (Rajbhandari 2020, arXiv:1910.02054) as DeepSpeed 0.19 runs it: half-precision weights, fp32 masters in parts.

Mirrors deepspeed/runtime/zero. The engine makes the whole model half precision, frozen weights too, and nothing is
autocast. Stages 1 and 2 (stage_1_and_2.py): weights are whole; the trainable ones lie in a flat buffer, of whose fp32
copy a rank holds its part with the optimizer's states; gradients go through one or, with `overlap_comm`, two buffers of
`reduce_bucket_size` elements, however few gradients there are, made for each backward; stage 2 keeps the part of each
gradient, stage 1 all gradients, until backward is done. Before the step the part becomes fp32.
Stage 3 (stage3.py, partition_parameters.py): every parameter is flat in equal parts, frozen ones too; those of at most
`param_persistence_threshold` elements stay whole beside that; the parts' gradients and the bucket are made once. What
is used again within `max_reuse_distance` elements stays gathered (partitioned_param_coordinator.py,
__params_to_release), so as many of the last layers stay whole from forward to backward; `prefetch_bucket_size`
elements are gathered ahead.

Gradients of a layer die together here at the layer's end, where really each goes into the bucket when it comes: errs
high by a layer's gradients. Stage 3's layers that stay are taken to be there all through forward: errs high in forward.
Not modelled: offload, `sub_group_size` below a rank's part, hierarchical and quantized partitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.layouts.base import Layout
from peftplan.layouts.units import Before, Ledger, Message, Piece, Schedule, Style, Unit, Whole
from peftplan.units import DType, ceil_div

_BUCKET, _GATHERED, _STAYING = "@@bucket", "@@gathered", "@@staying"


@dataclass(frozen=True)
class Zero(Style):
    """What the stages share. Sizes are numbers of elements."""

    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None
    """Unset: in stage 3 only."""
    contiguous_gradients: bool = True

    shards_weights = True
    autocasts = False
    masters = DType.float32
    stage: ClassVar[int]

    def gathers_in(self, autocast: DType | None) -> DType | None:
        return autocast

    def whole_sizes(self, piece: Piece) -> tuple[int, ...]:
        return (piece.numel * piece.gathered.size,)

    def held_bytes(self, piece: Piece, layout: Layout) -> Sequence[int]:
        del layout
        return self.whole_sizes(piece)

    def kept_bytes(self, piece: Piece, layout: Layout) -> int:
        """Of a gradient, what is there between micro-batches."""
        return ceil_div(piece.numel, layout.shards) * piece.gathered.size

    def stepped(self, piece: Piece, layout: Layout) -> tuple[int, ...]:
        return (ceil_div(piece.numel, layout.shards),)

    def before(self, *, accumulates: bool) -> Before:
        return "shards" if accumulates else "none"

    def bucket_bytes(self, dtype: DType) -> int:
        """The buffers that gradients are reduced in."""
        overlaps = self.overlap_comm if self.overlap_comm is not None else self.stage == 3
        return (1 + overlaps) * self.reduce_bucket_size * dtype.size if self.contiguous_gradients else 0

    def schedule(self, units: Sequence[tuple[Unit, int]], layout: Layout, *, adds: bool) -> Schedule:
        return _Run(self, units, layout, adds=adds)

    def messages(
        self, units: Sequence[tuple[Unit, int]], layout: Layout, *, micro_batches: int, backwards: bool
    ) -> Sequence[Message]:
        """Gradients to their owners in every micro-batch, parameters back after the step."""
        del backwards
        trained = sum(self.whole_sizes(p)[0] * count for unit, count in units for p in unit.pieces if p.trainable)
        times = micro_batches if self.stage > 1 else 1
        return [
            Message("reduce_scatter", times * trained, layout.shards, calls=times),
            Message("all_gather", trained, layout.shards),
        ]


@final
@dataclass(frozen=True)
class Zero1(Zero):
    stage = 1

    def kept_bytes(self, piece: Piece, layout: Layout) -> int:
        del layout
        return self.whole_sizes(piece)[0]


@final
@dataclass(frozen=True)
class Zero2(Zero):
    stage = 2


@final
@dataclass(frozen=True)
class Zero3(Zero):
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000

    stage = 3

    def held_bytes(self, piece: Piece, layout: Layout) -> Sequence[int]:
        part = ceil_div(piece.numel, layout.shards) * piece.gathered.size
        return (part, *self.whole_sizes(piece)) if self.persists(piece) else (part,)

    def persists(self, piece: Piece) -> bool:
        """Whether it stays whole."""
        return piece.numel <= self.param_persistence_threshold

    def buffers(self, units: Sequence[tuple[Unit, int]], layout: Layout) -> Sequence[int]:
        """The parts' gradients and the bucket, made once."""
        trained = [(p, count) for unit, count in units for p in unit.pieces if p.trainable]
        if not trained:
            return ()
        parts = sum(self.kept_bytes(p, layout) * count for p, count in trained)
        return parts, self.bucket_bytes(trained[0][0].gathered)

    def messages(
        self, units: Sequence[tuple[Unit, int]], layout: Layout, *, micro_batches: int, backwards: bool
    ) -> Sequence[Message]:
        """Parameters gathered for forward and again for backward, gradients to their owners."""
        gathered = [(p, count) for unit, count in units for p in unit.pieces if not self.persists(p)]
        whole = sum(self.whole_sizes(p)[0] * count for p, count in gathered)
        trained = sum(self.whole_sizes(p)[0] * count for unit, count in units for p in unit.pieces if p.trainable)
        times = (1 + backwards) * micro_batches
        modules = sum(count for _, count in gathered)
        return [
            Message("all_gather", times * whole, layout.shards, calls=times * modules),
            Message("reduce_scatter", micro_batches * trained, layout.shards, calls=micro_batches),
        ]


class _Run(Schedule):
    def __init__(self, style: Zero, units: Sequence[tuple[Unit, int]], layout: Layout, *, adds: bool) -> None:
        self.style, self.layout, self.adds = style, layout, adds
        *self.layers, (self.root, _) = units
        self.bucket = self.staying = self.ahead = 0

    def _stays(self) -> int:
        """Bytes of the last layers, as far as they are used again soon enough."""
        style, numel, size = self.style, 0, 0
        if not isinstance(style, Zero3):
            return 0
        most = min(style.max_reuse_distance // 2, style.max_live_parameters)
        for unit, count in reversed(self.layers):
            own = sum(p.numel for p in self._gathers(unit))
            some = min(count, (most - numel) // own) if own else 0
            numel, size = numel + some * own, size + some * self._bytes(unit)
        return size

    def _gathers(self, unit: Unit) -> list[Piece]:
        style = self.style
        return [p for p in unit.pieces if not style.persists(p)] if isinstance(style, Zero3) else []

    def _bytes(self, unit: Unit) -> int:
        return sum(self.style.whole_sizes(p)[0] for p in self._gathers(unit))

    def begin(self, ledger: Ledger) -> None:
        """The head, which is the largest of what is no layer's, counts as gathered throughout."""
        head = max((self.style.whole_sizes(p)[0] for p in self._gathers(self.root)), default=0)
        if head:
            ledger.alloc(head, "all_gather", f"@@{self.root.name} weights")
        self.staying = self._stays()
        if self.staying:
            ledger.alloc(self.staying, "all_gather", _STAYING)

    def enter(self, unit: Unit, ledger: Ledger) -> None:
        self._gather(unit, ledger)

    def leave(self, unit: Unit, ledger: Ledger) -> None:
        self._release(unit, ledger)

    def _gather(self, unit: Unit, ledger: Ledger) -> None:
        size = self._bytes(unit)
        if size and isinstance(self.style, Zero3):
            itemsize = self._gathers(unit)[0].gathered.size
            size += min(self.style.prefetch_bucket_size * itemsize, size)
            ledger.alloc(size, "all_gather", _GATHERED)
        self.ahead = size

    def _release(self, unit: Unit, ledger: Ledger) -> None:
        if self._bytes(unit):
            ledger.free(self.ahead, _GATHERED)

    def begin_backward(self, last: Unit, ledger: Ledger) -> None:
        trained = [p for p in (*last.pieces, *self.root.pieces) if p.trainable]
        if trained and self.style.stage < 3:
            self.bucket = self.style.bucket_bytes(trained[0].gathered)
            ledger.alloc(self.bucket, "reduce_scatter", _BUCKET)

    def enter_backward(self, unit: Unit, before: Unit | None, ledger: Ledger) -> None:
        del before
        part = min(self.staying // self.times, self._bytes(unit))
        if part:
            ledger.free(part, _STAYING)
            self.staying -= part * self.times
        self._gather(unit, ledger)

    def leave_backward(self, unit: Unit, gradients: Whole, ledger: Ledger, *, late: bool) -> None:
        del late
        self._release(unit, ledger)
        self._reduce(unit, gradients, ledger)

    def _reduce(self, unit: Unit, gradients: Whole, ledger: Ledger) -> None:
        ledger.drop(gradients)
        if not self.adds and not isinstance(self.style, Zero3):
            for p in unit.pieces:
                if p.trainable:
                    ledger.keep([self.style.kept_bytes(p, self.layout)])

    def end_backward(self, gradients: Whole, ledger: Ledger) -> None:
        self._reduce(self.root, gradients, ledger)
        head = max((self.style.whole_sizes(p)[0] for p in self._gathers(self.root)), default=0)
        if head:
            ledger.free(head, f"@@{self.root.name} weights")
        if self.bucket:
            ledger.free(self.bucket, _BUCKET)
