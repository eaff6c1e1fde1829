"""What a run costs: dollars from the hourly price, kilowatt-hours from the card's power limit."""

from __future__ import annotations

from dataclasses import dataclass

from peftplan.hardware.gpus import Gpu
from peftplan.hardware.prices import hourly_usd
from peftplan.job import Assumption, Job
from peftplan.result import Cost, Time

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class Priced:
    """A Cost with the reasons for its price and for what it leaves open."""

    cost: Cost
    notes: tuple[Assumption, ...]


def price(job: Job, time: Time, gpu: Gpu | None) -> Priced:
    """Cost of `job` at the expected speed, all its GPUs together.

    `energy_kwh` takes every card at its power limit for the whole time: errs high, and leaves out the host,
    which errs low.
    """
    notes: list[Assumption] = []
    hourly = _hourly(job, gpu, notes)
    hours = _hours(job, time, notes)
    speed = time.tokens_per_second
    per_million = usd_per_million(hourly, speed) if hourly is not None and speed else None
    if hourly is not None and per_million is None:
        notes.append(_none("cost.usd_per_million_tokens", "the speed is unknown"))
    return Priced(
        cost=Cost(
            usd_per_hour=hourly,
            usd_per_million_tokens=per_million,
            usd_total=hourly * hours if hourly is not None and hours is not None else None,
            energy_kwh=_energy(job, gpu, hours, notes),
        ),
        notes=tuple(notes),
    )


def usd_per_million(usd_per_hour: float, tokens_per_second: float) -> float:
    """Dollars for a million tokens at an hourly price and a speed above zero."""
    return usd_per_hour * 1e6 / tokens_per_second / SECONDS_PER_HOUR


def run_hours(tokens: int, tokens_per_second: float) -> float:
    """Hours for `tokens` at a speed above zero."""
    return tokens / tokens_per_second / SECONDS_PER_HOUR


def _none(what: str, why: str) -> Assumption:
    return Assumption(what=what, value=None, why=why)


def _hourly(job: Job, gpu: Gpu | None, notes: list[Assumption]) -> float | None:
    """Dollars an hour for all GPUs of the job."""
    cards = job.gpus * job.nodes
    if job.usd_per_hour is not None:
        return job.usd_per_hour * cards
    if gpu is None:
        notes.append(_none("cost", "no GPU named; give --gpu or --usd-per-hour"))
        return None
    found = hourly_usd(gpu)
    if found is None:
        notes.append(_none("cost", f"no price of {gpu.name} in the catalog; give --usd-per-hour"))
        return None
    why = f"median of {len(found.providers)} providers' list prices ({found.note}); --usd-per-hour sets yours"
    notes.append(Assumption(what="usd_per_hour", value=found.provider_median_usd, why=why))
    return found.provider_median_usd * cards


def _hours(job: Job, time: Time, notes: list[Assumption]) -> float | None:
    if job.tokens is None:
        notes.append(_none("cost.usd_total", "how many tokens to train on is not said; give --tokens"))
        return None
    if not time.tokens_per_second:
        notes.append(_none("cost.usd_total", "the speed is unknown"))
        return None
    return run_hours(job.tokens, time.tokens_per_second)


def _energy(job: Job, gpu: Gpu | None, hours: float | None, notes: list[Assumption]) -> float | None:
    if hours is None or gpu is None:
        notes.append(_none("cost.energy_kwh", "needs a known speed and --tokens"))
        return None
    if gpu.tdp_watts is None:
        notes.append(_none("cost.energy_kwh", f"the power limit of {gpu.name} is unknown"))
        return None
    notes.append(
        Assumption(
            what="cost.energy_kwh",
            value=gpu.tdp_watts,
            why="watts: the card's power limit all the time, errs high",
        )
    )
    return gpu.tdp_watts * job.gpus * job.nodes * hours / 1000
