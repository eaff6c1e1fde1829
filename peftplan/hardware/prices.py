"""What cards rent for (`prices.jsonl` beside this file): list prices from cloud price tables, with commit.

The tables carry no date; from their content they are of late 2025. A price is a snapshot, and the answer
says so; give your own with --usd-per-hour.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median

from peftplan.hardware.gpus import Gpu

_DATA = Path(__file__).with_name("prices.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """One instance type in one region."""

    provider: str
    region: str | None
    """None where the table names none."""
    instance_type: str
    gpu: str
    """A name of the GPU catalog."""
    gpus_per_instance: int
    usd_per_instance_hour: float
    usd_per_gpu_hour: float
    spot_usd_per_instance_hour: float | None
    spot_usd_per_gpu_hour: float | None
    with_host: bool
    """False where the machine around the card is billed on top."""
    source: str
    commit: str
    date: str | None
    date_note: str
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HourlyPrice:
    """On-demand dollars for one GPU for one hour, over the rows of `providers`."""

    usd: float
    """The median row. A provider listed with many regions weighs more; `provider_median_usd` undoes that."""
    provider_median_usd: float
    """The median of each provider's own median."""
    low_usd: float
    high_usd: float
    rows: int
    providers: tuple[str, ...]
    note: str


@lru_cache(maxsize=1)
def prices() -> Sequence[Price]:
    """Every price of the catalog."""
    with _DATA.open(encoding="utf-8") as lines:
        return tuple(Price(**json.loads(line)) for line in lines)


def hourly_usd(gpu: Gpu) -> HourlyPrice | None:
    """The on-demand price of `gpu`, or None where the catalog has none.

    Rows that leave the host machine out are used only where there are no others; they err low.
    """
    return _hourly_usd(gpu.name)


@lru_cache(maxsize=256)
def _hourly_usd(gpu: str) -> HourlyPrice | None:
    rows = [price for price in prices() if price.gpu == gpu]
    rows = [price for price in rows if price.with_host] or rows
    return _summary(rows) if rows else None


def _summary(rows: Sequence[Price]) -> HourlyPrice:
    by_provider: dict[str, list[float]] = {}
    for row in rows:
        by_provider.setdefault(row.provider, []).append(row.usd_per_gpu_hour)
    every = [row.usd_per_gpu_hour for row in rows]
    return HourlyPrice(
        usd=median(every),
        provider_median_usd=median(median(own) for own in by_provider.values()),
        low_usd=min(every),
        high_usd=max(every),
        rows=len(rows),
        providers=tuple(sorted(by_provider)),
        note=_note(rows),
    )


def _note(rows: Sequence[Price]) -> str:
    dates = "; ".join(sorted({row.date or row.date_note for row in rows}))
    host = "" if all(row.with_host for row in rows) else "; the host machine is billed on top"
    return dates + host
