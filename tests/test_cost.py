"""Dollars and kilowatt-hours."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan.cost import price
from peftplan.hardware import find_gpu, hourly_usd
from peftplan.job import make_job
from peftplan.result import Interval, Time

A100 = find_gpu("a100-80gb")


def time(tokens_per_second: float | None = 1000.0) -> Time:
    known = Interval(low=1, expected=2, high=4) if tokens_per_second else None
    return Time(step_seconds=known, tokens_per_second=tokens_per_second, mfu=None, breakdown=None)


def job(**fields: Any) -> Any:
    return make_job(model="llama-7b", **fields)


def test_cost_of_a_run() -> None:
    """3.6 M tokens at 1,000 a second: one hour at 2 dollars and 400 watts."""
    cost = price(job(tokens=3_600_000, usd_per_hour=2.0), time(), A100).cost
    assert cost.usd_per_hour == 2.0
    assert cost.usd_total == pytest.approx(2.0)
    assert cost.usd_per_million_tokens == pytest.approx(2.0 / 3.6)
    assert cost.energy_kwh == pytest.approx(0.4)


def test_the_catalogs_price_is_the_median_of_the_providers() -> None:
    found = hourly_usd(A100)
    assert found is not None
    priced = price(job(), time(), A100)
    assert priced.cost.usd_per_hour == found.provider_median_usd
    assert any("--usd-per-hour" in note.why for note in priced.notes)


@pytest.mark.parametrize(
    ("fields", "speed", "gpu", "nulls"),
    [
        ({}, 1000.0, A100, {"cost.usd_total", "cost.energy_kwh"}),
        ({"tokens": 10}, None, A100, {"cost.usd_total", "cost.energy_kwh", "cost.usd_per_million_tokens"}),
        ({"tokens": 10}, 1000.0, None, {"cost", "cost.energy_kwh"}),
        ({"tokens": 10}, 1000.0, find_gpu("tpu-v4"), {"cost.energy_kwh", "cost"}),
    ],
)
def test_every_null_has_its_reason(fields: Any, speed: float | None, gpu: Any, nulls: set[str]) -> None:
    priced = price(job(**fields), time(speed), gpu)
    said = {note.what for note in priced.notes if note.value is None}
    assert nulls <= said
    for name, value in priced.cost.model_dump().items():
        if value is None:
            assert said & {"cost", f"cost.{name}"}, name


def test_a_free_card_costs_nothing() -> None:
    cost = price(job(tokens=10, usd_per_hour=0.0), time(), None).cost
    assert (cost.usd_per_hour, cost.usd_per_million_tokens, cost.usd_total) == (0, 0, 0)
