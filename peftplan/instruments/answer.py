"""What a trace answers: the Trace, and how its numbers are read off the recorded events."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from peftplan.instruments.recorder import STATIC_KINDS, Event, Saved, Storage

PHASES = ("forward", "loss", "backward", "optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One steady training step of the real model. All sizes in bytes, unrounded; all FLOPs with 1 MAC = 2."""

    job: dict[str, Any]
    mode: str
    """`fake` (no data) or `real` (random weights)."""
    backend: str
    """Whose kernels ran: always `cpu`."""
    parameters: dict[str, int]
    """`total`, `trainable` as PEFT counts them; `stored_bytes`: unique storages, constants too."""
    static: dict[str, int]
    """Bytes by kind of what lives between steps (kinds: recorder.STATIC_KINDS)."""
    static_bytes: int
    saved_for_backward_bytes: int
    """Storages alive at the end of forward only because backward needs them: no parameters, no buffers."""
    peak_bytes: int
    peak_phase: str
    phases: dict[str, int]
    """Peak bytes while in each phase."""
    flops: dict[str, int]
    """`forward` (with the loss), `backward` (without recomputation), `recompute`, `optimizer`, `total`."""
    saved: tuple[Saved, ...]
    at_peak: tuple[Storage, ...]
    events: tuple[Event, ...]
    """In order; those of phase `static` are what lives between steps. Runs of frees are sorted by id."""
    versions: dict[str, str]
    notes: tuple[str, ...]

    def model_dump(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("saved", "at_peak", "events"):
            fields[name] = [row._asdict() for row in fields[name]]
        return fields

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.model_dump(), indent=indent)


def ordered(events: Iterable[Event]) -> list[Event]:
    """The same events with every run of frees sorted by id: autocast clears its cache in no fixed order."""
    rows: list[Event] = []
    for action, run in itertools.groupby(events, key=lambda event: event.action):
        batch = list(run)
        rows.extend(sorted(batch, key=lambda event: event.id) if action == "free" else batch)
    return rows


def by_kind(storages: Iterable[Storage]) -> dict[str, int]:
    """Bytes of each static kind."""
    kinds = dict.fromkeys(STATIC_KINDS, 0)
    for storage in storages:
        kinds[storage.kind] += storage.bytes
    return kinds


def levels(events: Iterable[Event]) -> Iterator[int]:
    """Bytes alive after each event."""
    return itertools.accumulate(event.bytes if event.action == "alloc" else -event.bytes for event in events)


def phase_peaks(events: list[Event]) -> dict[str, int]:
    """The most bytes alive while in each phase; a phase starts with what the one before left."""
    peaks = dict.fromkeys(PHASES, 0)
    before = 0
    for event, level in zip(events, levels(events), strict=True):
        if event.phase in peaks:
            peaks[event.phase] = max(peaks[event.phase], before, level)
        before = level
    return peaks


def alive_at_peak(events: list[Event]) -> list[int]:
    """The ids of the storages alive when the step first reaches its peak."""
    heights = [level if event.phase in PHASES else -1 for event, level in zip(events, levels(events), strict=True)]
    alive: dict[int, None] = {}
    for event in events[: heights.index(max(heights)) + 1]:
        if event.action == "alloc":
            alive[event.id] = None
        else:
            del alive[event.id]
    return list(alive)
