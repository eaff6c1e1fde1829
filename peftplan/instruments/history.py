"""The caching allocator's own history of a run, and what our replay makes of the same requests.

A history is gzipped JSON of schema `peftplan.history/1`: `events`, each `[action, address, bytes]` as
`torch.cuda.memory._snapshot()` traces them (`alloc` and `free_completed` of blocks, `segment_alloc` and `segment_free`
of segments, `segment_map` and `segment_unmap` of expandable ones), from an empty allocator on. Nothing is pickled.

`python -m peftplan.instruments.history FILE` prints what was reserved, and what `step.allocator` says.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftplan.errors import BadFile
from peftplan.step.allocator import AllocatorSettings, CachingAllocator, Event

SCHEMA = "peftplan.history/1"
MOST_EVENTS = 2_000_000
_GROWS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}

Row = tuple[str, int, int]
"""(action, address, bytes)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """One history: the most that was reserved, and what a replay of its requests reserves."""

    reserved_bytes: int
    replayed_bytes: int
    requests: int


@contextmanager
def recording(path: str | None) -> Iterator[None]:
    """Inside, the allocator writes down what it does; afterwards it is in the file `path`. None for nothing."""
    if path is None:
        yield
        return
    import torch

    torch.cuda.memory._record_memory_history("all", context=None, max_entries=MOST_EVENTS)
    try:
        yield
    finally:
        traced = torch.cuda.memory._snapshot()["device_traces"][0]
        torch.cuda.memory._record_memory_history(None)
        write(path, ((row["action"], row["addr"], row["size"]) for row in traced))


def write(path: str | Path, rows: Any) -> None:
    """Raises BadFile where the file cannot be written."""
    try:
        with gzip.open(path, "wt", encoding="ascii") as out:
            json.dump({"schema": SCHEMA, "events": list(rows)}, out)
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror or error}") from None


def read(path: str | Path) -> list[Row]:
    """Raises BadFile for what is no history."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            data = json.load(file)
    except (OSError, ValueError, EOFError) as error:
        raise BadFile(f"{path}: not a history ({error})") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise BadFile(f"{path}: not a history of schema {SCHEMA}")
    return [(str(action), int(address), int(size)) for action, address, size in data["events"]]


def replayed(rows: Sequence[Row], settings: AllocatorSettings | None = None) -> Replayed:
    """The history's requests through our allocator."""
    level = most = 0
    for action, _, size in rows:
        level += _GROWS.get(action, 0) * size
        most = max(most, level)
    requests = list(_requests(rows))
    usage = CachingAllocator(settings).run(requests)
    made = sum(size is not None for _, size in requests)
    return Replayed(reserved_bytes=most, replayed_bytes=usage.peak_reserved_bytes, requests=made)


def _requests(rows: Sequence[Row]) -> Iterator[Event]:
    living: dict[int, int] = {}
    for number, (action, address, size) in enumerate(rows):
        if action == "alloc":
            living[address] = number
            yield number, size
        elif action == "free_completed" and address in living:
            yield living.pop(address), None


def main(arguments: list[str]) -> int:
    for path in arguments:
        found = replayed(read(path))
        error = found.replayed_bytes / found.reserved_bytes - 1 if found.reserved_bytes else 0.0
        print(
            f"{path}: {found.requests} requests, reserved {found.reserved_bytes:,} bytes, "
            f"replayed {found.replayed_bytes:,} ({error:+.2%})"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
