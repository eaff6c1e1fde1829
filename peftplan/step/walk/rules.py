"""How bytes are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftplan.units import MIB


def exact(request_bytes: int) -> int:
    """A request counts for what it asks: how a trace counts."""
    return request_bytes


def block_size(request_bytes: int) -> int:
    """Bytes torch's CUDA caching allocator counts as allocated for a request, served from fresh segments.

    c10/cuda/CUDACachingAllocator.cpp: requests are rounded to 512 B; from 10 MiB on a segment is the request rounded to
    2 MiB, and a rest of at most 1 MiB is not split off, so it counts as allocated with the block.
    """
    rounded = request_bytes + -request_bytes % 512
    if rounded < 10 * MIB:
        return rounded
    rest = -rounded % (2 * MIB)
    return rounded + rest if rest <= MIB else rounded


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How bytes are counted."""

    size: Callable[[int], int] = block_size
    """Bytes that a request of so many bytes counts for."""
