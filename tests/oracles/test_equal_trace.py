"""The estimate of many small jobs equals what the real model does, traced: counted things exactly, peaks nearly all."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from tests.oracles.cases import DIMENSIONS, NEAR, cases, job_of, possible
from tests.oracles.compare import assert_equal
from tests.oracles.cover import Row, pairs, pairs_of

CASES = cases()


@pytest.mark.trace
@pytest.mark.parametrize("row", CASES, ids=" ".join)
def test_the_estimate_equals_the_trace(row: Row) -> None:
    assert_equal(job_of(row), exact_peak=row not in NEAR)


def test_at_least_nine_in_ten_peaks_are_equal_to_the_byte() -> None:
    """Every peak that is not named in NEAR is compared to the byte."""
    assert set(CASES) >= NEAR
    assert len(CASES) >= 320
    assert len(NEAR) <= len(CASES) // 10


def test_every_pair_of_values_meets_in_a_case() -> None:
    values = tuple(tuple(choices) for choices in DIMENSIONS.values())
    met = {pair for row in CASES for pair in pairs_of(row)}
    assert set(pairs(values, possible)) <= met
