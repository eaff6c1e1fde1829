"""How bytes are counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftplan.step.allocator import fresh_block_bytes


def exact(request_bytes: int) -> int:
    """A request counts for what it asks: how a trace counts."""
    return request_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How bytes are counted."""

    size: Callable[[int], int] = fresh_block_bytes
    """Bytes that a request of so many bytes counts for."""
