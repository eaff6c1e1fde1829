"""The common GPUs that a report names, and which of them hold an amount of memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU by its short name and the bytes of it that a process can use."""

    name: str
    usable_bytes: int

    def holds(self, needed_bytes: int) -> bool:
        return needed_bytes <= self.usable_bytes


def common() -> tuple[Card, ...]:
    """The common GPUs, smallest first."""
    from peftplan.hardware import usable_bytes
    from peftplan.hardware.common import common_gpus

    sizes = {short: usable_bytes(gpu).bytes for short, gpu in common_gpus().items()}
    cards = (Card(name=name, usable_bytes=size) for name, size in sizes.items() if size is not None)
    return tuple(sorted(cards, key=lambda card: card.usable_bytes))
