"""What FSDP1 and FSDP2 share: shards of every parameter, gathered for a unit at a time; mixed precision; messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from peftplan.layouts.base import Layout
from peftplan.layouts.units import Before, Message, Piece, Style, Unit
from peftplan.units import DType, parse_dtype


@dataclass(frozen=True)
class Sharded(Style, ABC):
    reshard_after_forward: bool = True
    """Whether whole parameters go after a unit's forward (ZeRO-3) or stay until backward (ZeRO-2)."""
    param_dtype: str | None = None
    """MixedPrecisionPolicy's: what parameters are gathered in; with --precision bf16-mixed, that."""
    reduce_dtype: str | None = None
    """What gradients are reduced in; the parameters' own as gathered, unless told."""
    upcast: bool | None = None
    """Whether trainable parameters are held in fp32, as accelerate sees to under mixed precision unless weights are
    packed."""
    no_sync: bool = True
    """Whether micro-batches before the last keep whole gradients and reduce nothing (accelerate's default)."""

    shards_weights = True
    overlaps = 0.9

    @abstractmethod
    def shard(self, piece: Piece, layout: Layout) -> tuple[int, ...]:
        """The shape of the fullest rank's part, padding included."""

    def gathers_in(self, autocast: DType | None) -> DType | None:
        return parse_dtype(self.param_dtype) if self.param_dtype is not None else autocast

    def upcasts(self, *, mixed: bool, packed: bool) -> bool:
        return self.upcast if self.upcast is not None else mixed and not packed

    def held_bytes(self, piece: Piece, layout: Layout) -> Sequence[int]:
        own = piece if piece.whole else piece._replace(shape=self.shard(piece, layout))
        return (own.numel * piece.held.size,)

    def stepped(self, piece: Piece, layout: Layout) -> tuple[int, ...]:
        return self.shard(piece, layout)

    def before(self, *, accumulates: bool) -> Before:
        if not accumulates:
            return "none"
        return "whole" if self.no_sync else "shards"

    def messages(
        self, units: Sequence[tuple[Unit, int]], layout: Layout, *, micro_batches: int, backwards: bool
    ) -> Sequence[Message]:
        found = []
        for unit, count in units:
            gathers = 1 + (backwards and unit.is_layer and self.reshard_after_forward)
            whole = sum(self.whole_bytes(p, layout, p.gathered) for p in unit.sharded)
            found.append(
                Message(
                    "all_gather",
                    gathers * micro_batches * count * whole,
                    layout.shards,
                    calls=gathers * micro_batches * count,
                )
            )
            times = 1 if self.no_sync else micro_batches
            reduced = sum(self.whole_bytes(p, layout, self.reduced(p)) for p in unit.sharded if p.trainable)
            if reduced:
                found.append(Message("reduce_scatter", times * count * reduced, layout.shards, calls=times * count))
                if layout.replicates > 1:
                    part = times * count * reduced // layout.shards
                    found.append(Message("all_reduce", part, layout.replicates, across=True, calls=times * count))
        return found

    def whole_bytes(self, piece: Piece, layout: Layout, dtype: DType) -> int:
        """Of one parameter with its padding, in the dtype given."""
        return layout.shards * piece._replace(shape=self.shard(piece, layout)).numel * dtype.size

    def reduced(self, piece: Piece) -> DType:
        """The dtype that a gradient is reduced in."""
        return parse_dtype(self.reduce_dtype) if self.reduce_dtype is not None else piece.gathered
