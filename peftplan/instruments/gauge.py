"""What the device's own allocator says while a loop runs: the peak of every phase, and what is allocated now.

On CUDA the caching allocator counts. The CPU's counts for nobody, so there torch's profiler writes down every
allocation and every free: for tiny models. Two sizes are left out of that: Python numbers inside operators (8 bytes)
and the random state that each checkpoint keeps (5,056), which are on the host on any device.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

HOST_BYTES = (8, 5056)
_MARK = "peftplan phase "


class Gauge(ABC):
    """Peaks by phase, in bytes. A phase lasts until the next one begins; a repeated one keeps its higher peak."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        """What the caching allocator reserved at most; nothing on the CPU."""
        self.began: dict[str, int] = {}
        """Bytes allocated when each phase began."""

    @abstractmethod
    def begin(self, phase: str) -> None:
        """The phase `phase` begins."""

    @abstractmethod
    def watching(self) -> AbstractContextManager[None]:
        """Inside, phases are read; what was read holds once it is left."""

    @abstractmethod
    def mark(self) -> Any:
        """A moment."""

    @abstractmethod
    def seconds(self, marks: list[Any]) -> tuple[float, ...]:
        """Between each moment and the next."""

    def note(self, phase: str, peak_bytes: int) -> None:
        self.peaks[phase] = max(self.peaks.get(phase, 0), peak_bytes)


class CudaGauge(Gauge):
    """torch.cuda's counters and events."""

    def __init__(self) -> None:
        super().__init__()
        self._phase = ""

    def begin(self, phase: str) -> None:
        if self._phase:
            self.note(self._phase, torch.cuda.max_memory_allocated())
            held = max(self.reserved.get(self._phase, 0), torch.cuda.max_memory_reserved())
            self.reserved[self._phase] = held
        torch.cuda.reset_peak_memory_stats()
        self._phase = phase
        self.began[phase] = torch.cuda.memory_allocated()

    @contextmanager
    def watching(self) -> Iterator[None]:
        yield
        self.begin("")

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: list[Any]) -> tuple[float, ...]:
        torch.cuda.synchronize()
        return tuple(before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks))


class CpuGauge(Gauge):
    """torch's profiler over everything from the first weight on."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0

    def begin(self, phase: str) -> None:
        self._count += 1
        with torch.profiler.record_function(f"{_MARK}{self._count} {phase}"):
            pass

    @contextmanager
    def watching(self) -> Iterator[None]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
            yield
        self._read(profiled.profiler.kineto_results.events())

    def _read(self, events: list[Any]) -> None:
        level, phase = 0, ""
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name().startswith(_MARK):
                phase = event.name().split(" ", 3)[3]
                self.began[phase] = level
            elif event.name() == "[memory]" and abs(event.nbytes()) not in HOST_BYTES:
                level += event.nbytes()
            if phase:
                self.note(phase, level)

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, marks: list[Any]) -> tuple[float, ...]:
        return tuple(after - before for before, after in itertools.pairwise(marks))
