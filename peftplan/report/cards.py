"""The common GPUs that a report names, and which of them hold an amount of memory."""

from __future__ import annotations

from dataclasses import dataclass

COMMON = {
    "NVIDIA GeForce RTX 3060 12GB": "RTX 3060 12GB",
    "NVIDIA T4": "T4 16GB",
    "NVIDIA GeForce RTX 3090": "RTX 3090 24GB",
    "NVIDIA GeForce RTX 4090": "RTX 4090 24GB",
    "NVIDIA L4": "L4 24GB",
    "NVIDIA GeForce RTX 5090": "RTX 5090 32GB",
    "NVIDIA A100 SXM4 40GB": "A100 40GB",
    "NVIDIA L40S": "L40S 48GB",
    "NVIDIA A100 SXM4 80GB": "A100 80GB",
    "NVIDIA H100 SXM5 80GB": "H100 80GB",
    "NVIDIA H200 SXM 141GB": "H200 141GB",
    "NVIDIA B200 SXM": "B200 180GB",
}
"""Catalog names and short ones of what is owned or rented most in each size: our choice (2026-11)."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU by its short name and the bytes of it that a process can use."""

    name: str
    usable_bytes: int

    def holds(self, needed_bytes: int) -> bool:
        return needed_bytes <= self.usable_bytes


def common() -> tuple[Card, ...]:
    """The common GPUs, smallest first."""
    from peftplan.hardware import find_gpu, usable_bytes

    sizes = {short: usable_bytes(find_gpu(name)).bytes for name, short in COMMON.items()}
    cards = (Card(name=name, usable_bytes=size) for name, size in sizes.items() if size is not None)
    return tuple(sorted(cards, key=lambda card: card.usable_bytes))
