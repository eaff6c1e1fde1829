"""What every importer needs: reading the tables, and turning printed numbers into bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftplan.records import Measured, MemoryKind, Record

Row = dict[str, Any]
MIB, GIB = 2**20, 2**30


def read_rows(path: Path) -> Iterator[Row]:
    """The JSON objects of a JSON-lines table."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def exact(kind: MemoryKind, value_bytes: float, *, why_off: str | None = None) -> Measured:
    """A value the source gives in bytes, or in MiB with fractions."""
    return Measured(kind=kind, bytes=round(value_bytes), why_off=why_off)


def printed(kind: MemoryKind, value: float, *, unit: int, digits: int) -> Measured:
    """A value the source prints with `digits` decimals of `unit` bytes."""
    return Measured(kind=kind, bytes=round(value * unit), half_digit_bytes=round(unit / 10**digits / 2))


def beyond(kind: MemoryKind, value_bytes: float, *, extra_bytes: float, why: str) -> Measured:
    """A value that counts `extra_bytes` which no job describes."""
    return Measured(kind=kind, bytes=round(value_bytes), beyond_model_bytes=round(extra_bytes), beyond_model_why=why)


def without_none(job: Row) -> Row:
    """`job` without the choices it leaves open."""
    return {key: value for key, value in job.items() if value is not None and value != {}}


def published(
    row: Row, *, job: Row, measured: tuple[Measured, ...], campaign: str, gaps: tuple[str, ...] = ()
) -> Record:
    """The record of one row of the published table."""
    return Record(
        id=row["id"],
        kind="published",
        source=row["source"].removeprefix("github issue/PR text (stored excerpt): "),
        source_rev=str(row.get("source_rev", "as stored")),
        date=str(row.get("date", "unknown")),
        campaign=campaign,
        gpu=row["gpu"],
        job=without_none(job),
        out_of_memory=bool(row["measured"].get("oom")),
        measured=measured,
        setup_known="full" if row["confidence"] == "full" else "partial",
        gaps=gaps,
        trainable_params=row.get("trainable_params"),
        notes=row.get("notes", ""),
        versions=row.get("versions", ""),
    )
