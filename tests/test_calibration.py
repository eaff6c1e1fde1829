"""The verdict rests on measured runs: what it was told, and how it does on campaigns that it was not told of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftplan.calibration import DATA, Calibration, Seen, calibration, least_margin, lines, seen
from peftplan.fit import verdict_of
from peftplan.pipeline import estimate
from peftplan.records import Record, load
from peftplan.units import GIB

ROOT = Path(__file__).parents[1]
BOTH = (calibration(packed=False), calibration(packed=True))


def test_the_file_is_what_the_records_give() -> None:
    from profiles.calibrate import rows

    assert DATA.read_text(encoding="utf-8") == lines(rows())


def _ran(record: Record) -> bool:
    return record.job.get("gpu") is not None and record.id in {row.id for row in seen()}


def test_no_job_that_ran_out_of_memory_is_called_fits_by_the_other_campaigns() -> None:
    failed = [record for record in load(ROOT / "profiles") if record.out_of_memory]
    assert len(failed) >= 2
    for record in failed:
        fit = estimate(record.to_job()).fit
        others = calibration(packed=True).without(record.campaign)
        assert fit.usable_bytes is not None
        assert fit.headroom_bytes is not None
        needed = fit.usable_bytes - fit.headroom_bytes
        assert verdict_of(needed, fit.usable_bytes, margin=others.margin) == "does_not_fit"


NEARLY_FULL = {"fms-liger-103", "fms-liger-116"}
"""Falls short: 76.4 and 77.2 of 79.2 GiB were used, and the replay leaves more of a nearly full card in pieces than
torch did: it needs 79.2 and 80.2."""


def test_no_job_that_ran_is_said_not_to_fit() -> None:
    ran = [record for record in load(ROOT / "profiles") if _ran(record)]
    assert len(ran) > 100
    assert {r.id for r in ran if estimate(r.to_job()).fit.verdict == "does_not_fit"} == NEARLY_FULL


@pytest.mark.parametrize("known", BOTH)
def test_intervals_hold_most_of_a_campaign_they_were_not_told_of(known: Calibration) -> None:
    """0.9 is what they claim; with 6 and 12 campaigns, one of which differs from all others, less is found."""
    assert known.left_out >= 0.8


@pytest.mark.parametrize("known", BOTH)
@given(needed=st.integers(1, 200 * GIB), usable=st.integers(1, 200 * GIB), more=st.integers(0, GIB))
def test_more_room_is_never_less_likely_to_do(known: Calibration, needed: int, usable: int, more: int) -> None:
    likely = known.probability(needed, usable)
    assert 0 < likely <= known.probability(needed, usable + more) < 1
    low, high = known.interval(needed)
    assert low <= high
    if usable >= needed * (1 + known.margin) + 1:
        assert likely == max(known.probability(needed, 10 * needed), likely)


def test_a_campaign_counts_once() -> None:
    one = [Seen(f"a{i}", "a", False, 110, 100) for i in range(99)]
    other = Seen("b", "b", False, 90, 100)
    known = Calibration((*one, other))
    assert known.probability(100, 105) == pytest.approx((2 * 0.5 + 0.5) / 3)
    assert known.margin == pytest.approx(0.1)
    assert known.interval(1000) == (900, 1100)
    assert known.without("a").interval(1000) == (900, 900)


def test_packed_weights_ask_for_more_room() -> None:
    assert calibration(packed=True).margin > calibration(packed=False).margin == least_margin() > 0


def test_the_answer_says_what_its_verdict_rests_on() -> None:
    fit = estimate(model="llama-7b", method="qlora", gpu="rtx-4090").fit
    assert fit.confidence is not None
    assert "measured runs with packed weights" in fit.confidence
    assert fit.low_bytes is not None
    assert fit.high_bytes is not None
    assert fit.usable_bytes is not None
    assert fit.low_bytes < fit.usable_bytes - (fit.headroom_bytes or 0) < fit.high_bytes
    assert estimate(model="llama-7b", method="qlora").fit.probability is None
