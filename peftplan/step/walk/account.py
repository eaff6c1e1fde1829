"""The bytes of one region: how many are alive now, and how many were at the highest point."""

from __future__ import annotations

from dataclasses import dataclass

EXIT_GRADIENT, SCRATCH, CARRIED = "gradient 0", "scratch", "carried"
"""Keys of events: the gradient that comes into a region's backward, a kernel's temporaries, and the last gradient of a
weight that the region before left to be used here."""

Key = str | int
"""What is allocated: a storage by its name, a gradient by its number."""


def event_key(key: Key) -> str:
    """A key as events spell it."""
    return key if isinstance(key, str) else f"gradient {key}"


@dataclass(slots=True)
class Watermark:
    """The highest point of a phase: total bytes, and how much of it was kept for backward or parameter gradients."""

    bytes: int = 0
    saved_bytes: int = 0
    grad_bytes: int = 0
    where: str = ""


class Account:
    """Bytes relative to what is alive when the region is entered."""

    __slots__ = ("current", "grad_bytes", "peak", "saved_bytes")

    def __init__(self) -> None:
        self.current = 0
        self.saved_bytes = 0
        self.grad_bytes = 0
        self.peak = Watermark()

    def start_phase(self, where: str) -> None:
        """Forget the peak so far."""
        self.peak = Watermark(self.current, self.saved_bytes, self.grad_bytes, where)

    def alloc(self, size: int, where: str, key: Key) -> None:  # noqa: ARG002
        self.current += size
        if self.current > self.peak.bytes:
            self._mark(self.current, where)

    def touch(self, size: int, where: str) -> None:
        """Temporaries of one kernel, allocated after its output."""
        if self.current + size > self.peak.bytes:
            self._mark(self.current + size, where)

    def compose(self, size: int, where: str, key: Key, *, scratch: int, pieces: int) -> None:  # noqa: ARG002
        """An output of several kernels, the last of which makes it: temporaries are there before it is."""
        self.alloc(size, where, key)
        self.touch(scratch, where)

    def free(self, size: int, key: Key) -> None:  # noqa: ARG002
        self.current -= size

    def _mark(self, size: int, where: str) -> None:
        peak = self.peak
        peak.bytes, peak.saved_bytes, peak.grad_bytes, peak.where = size, self.saved_bytes, self.grad_bytes, where


class Recording(Account):
    """An account that writes down what is allocated (+ bytes) and freed (- bytes), by key."""

    __slots__ = ("events",)

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []

    def take(self) -> list[tuple[str, int]]:
        """The events so far, which are then forgotten."""
        events, self.events = self.events, []
        return events

    def alloc(self, size: int, where: str, key: Key) -> None:
        self.events.append((event_key(key), size))
        super().alloc(size, where, key)

    def touch(self, size: int, where: str) -> None:
        self.events += ((SCRATCH, size), (SCRATCH, -size))
        super().touch(size, where)

    def compose(self, size: int, where: str, key: Key, *, scratch: int, pieces: int) -> None:
        temporaries = [(f"{SCRATCH} {i}", scratch // pieces) for i in range(pieces)]
        self.events += [*temporaries, (event_key(key), size), *((name, -part) for name, part in temporaries)]
        Account.alloc(self, size, where, key)
        Account.touch(self, scratch, where)

    def free(self, size: int, key: Key) -> None:
        self.events.append((event_key(key), -size))
        super().free(size, key)
