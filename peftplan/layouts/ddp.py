"""DistributedDataParallel (Li 2020, arXiv:2006.15704): a replica on each rank, gradients summed in buckets.

Mirrors torch 2.13, torch/nn/parallel/distributed.py and torch/csrc/distributed/c10d/reducer.cpp
(initialize_buckets): flat buffers as large as all gradients that are ever reduced, made once, `bucket_cap_mb` each, the
first 1 MB. Unless `gradient_as_bucket_view`, gradients are tensors of their own, copied in and out; with it they are
views of the buckets, so they live between steps, and what backward computes is copied there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from peftplan.layouts.base import Layout
from peftplan.layouts.units import Before, Message, Piece, Style, Unit

_MIB = 2**20
_FIRST = 1 * _MIB
"""torch/csrc/distributed/c10d/reducer.hpp, kDefaultFirstBucketBytes."""


@final
@dataclass(frozen=True)
class Ddp(Style):
    bucket_cap_mb: float = 25
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    find_unused_parameters: bool = False
    no_sync: bool = True
    """Whether micro-batches before the last reduce nothing (accelerate's default)."""

    def before(self, *, accumulates: bool) -> Before:
        return "whole" if accumulates or self.gradient_as_bucket_view else "none"

    def held_bytes(self, piece: Piece, layout: Layout) -> Sequence[int]:
        del layout
        return (piece.numel * piece.held.size,)

    def buffers(self, units: Sequence[tuple[Unit, int]], layout: Layout) -> Sequence[int]:
        """The buckets, which are the gradients themselves where those are views."""
        del layout
        return () if self.gradient_as_bucket_view else self.buckets(units)

    def buckets(self, units: Sequence[tuple[Unit, int]]) -> list[int]:
        """In the order gradients arrive: the last parameters first, each dtype in buckets of its own."""
        open_: dict[str, int] = {}
        made: list[int] = []
        limit = {True: _FIRST, False: int(self.bucket_cap_mb * _MIB)}
        for unit, count in reversed(units):
            own = [p for p in reversed(unit.pieces) if p.trainable]
            for p in own * count:
                dtype = p.held.label
                open_[dtype] = open_.get(dtype, 0) + p.numel * p.held.size
                if open_[dtype] >= limit[not made]:
                    made.append(open_.pop(dtype))
        return [*made, *open_.values()]

    def messages(
        self, units: Sequence[tuple[Unit, int]], layout: Layout, *, micro_batches: int, backwards: bool
    ) -> Sequence[Message]:
        del backwards
        buckets = self.buckets(units)
        times = 1 if self.no_sync else micro_batches
        return [Message("all_reduce", times * sum(buckets), layout.dp, calls=times * len(buckets))] if buckets else []


STYLE = Ddp
