"""The reports: what they must say, and that they can be read anywhere."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import RenderableType

from peftplan.report import bars, cards, ledger, lists, paper, screen, tables, words
from peftplan.result import Estimate
from tests import sample
from tests.sample import GIB


class Stream(io.StringIO):
    """A place to print to: a terminal or not, with an encoding."""

    def __init__(self, *, terminal: bool = False, encoding: str = "utf-8") -> None:
        super().__init__()
        self._terminal, self._encoding = terminal, encoding

    def isatty(self) -> bool:
        return self._terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")


def _screen(answer: Estimate, stream: Stream | None = None) -> str:
    report = screen.render(answer, sample.savings(), sample.CARDS)
    return paper.render(report, stream or Stream())


def _fit(usable_bytes: int, verdict: str) -> dict[str, Any]:
    spare = usable_bytes - (sample.estimate().memory.device_bytes or 0)
    return {
        "gpu": "NVIDIA T4",
        "usable_bytes": usable_bytes,
        "headroom_bytes": spare,
        "verdict": verdict,
        "confidence": None,
    }


NO_GPU = {"gpu": None, "usable_bytes": None, "headroom_bytes": None, "verdict": None, "confidence": None}


@pytest.mark.parametrize(
    ("fit", "says"),
    [
        (
            _fit(23 * GIB, "fits"),
            "FITS  on NVIDIA T4   needs 7.93 GiB of 23.00 GiB usable · 15.07 GiB to spare",
        ),
        (
            _fit(8 * GIB, "tight"),
            "TIGHT  on NVIDIA T4   needs 7.93 GiB of 8.00 GiB usable · 69.22 MiB to spare",
        ),
        (_fit(7 * GIB, "does_not_fit"), "DOES NOT FIT  on NVIDIA T4   needs 7.93 GiB of 7.00 GiB"),
        (NO_GPU, "NEEDS 7.93 GiB  on the card · fits on RTX 3060 12GB or T4 16GB and larger"),
    ],
)
def test_the_verdict_comes_first(fit: dict[str, Any], says: str) -> None:
    assert _screen(sample.estimate(fit=fit)).split("\n")[1].strip().startswith(says)


def test_more_than_any_card_is_said() -> None:
    report = screen.render(sample.estimate(fit=NO_GPU), (), sample.CARDS[:0])
    assert "more than any common GPU holds" in paper.render(report, Stream())


def test_it_is_one_screen_that_shows_everything() -> None:
    text = _screen(sample.estimate())
    assert len(text.split("\n")) <= 45
    for part in (
        "base weights", "activations", "optimizer states", "context, libraries", "on the card",
        "load", "forward", "backward", "3.69 GiB stay between steps",
        "4.19 M of 6.74 B parameters (0.06 %)", "109.00 TFLOP per micro-batch",
        "unknown · the clock is not calibrated", "$0.69 per hour",
        "batching = padded", "1 more in `peftplan explain`",
        "recompute full", "−2.61 GiB", "✓ RTX 3060 12GB",
    ):  # fmt: skip
        assert part in text


def test_unknown_reserved_and_device_bytes_leave_no_made_up_row() -> None:
    memory = {**sample.estimate().memory.model_dump(), "reserved_bytes": None, "device_bytes": None}
    text = _screen(sample.estimate(memory=memory, fit=NO_GPU))
    assert "context, libraries" not in text
    assert "NEEDS 7.10 GiB  allocated" in text


def test_known_time_and_cost_come_with_their_interval() -> None:
    time = {
        "step_seconds": {"low": 0.7, "expected": 0.84, "high": 1.0},
        "tokens_per_second": 4876.2,
        "mfu": 0.41,
        "breakdown": None,
    }
    cost = {"usd_per_hour": 0.69, "usd_per_million_tokens": 0.039, "usd_total": 120.4, "energy_kwh": 7.25}
    text = _screen(sample.estimate(time=time, cost=cost))
    assert "840 ms per step (700 ms to 1.00 s) · 4,876 tokens/s · 41 % of peak FLOP/s" in text
    assert "$120 in total · $0.039 per million tokens · $0.69 per hour · 7.2 kWh" in text


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("kind", ["screen", "ledger"])
def test_no_line_is_wider_than_the_terminal(kind: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    answer = sample.estimate()
    reports: dict[str, RenderableType] = {
        "screen": screen.render(answer, sample.savings(), sample.CARDS),
        "ledger": ledger.render(answer, sample.terms(), sample.savings()),
    }
    text = paper.render(reports[kind], Stream())
    assert max(len(line) for line in text.split("\n")) <= min(width, paper.MAX_WIDTH)


def test_colour_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = sample.estimate()
    assert "\x1b[" not in _screen(answer, Stream())
    assert "38;5;" in _screen(answer, Stream(terminal=True))
    monkeypatch.setenv("NO_COLOR", "1")
    bare = _screen(answer, Stream(terminal=True))
    assert "38;5;" not in bare
    assert "48;5;" not in bare


def test_a_terminal_without_unicode_gets_ascii_in_the_same_columns() -> None:
    answer = sample.estimate()
    ascii_text, text = _screen(answer, Stream(encoding="ascii")), _screen(answer, Stream())
    assert ascii_text.isascii()
    assert "?" not in ascii_text
    assert [len(line) for line in ascii_text.split("\n")] == [len(line) for line in text.split("\n")]


@pytest.mark.parametrize(
    ("share", "bar"), [(0.0, ""), (0.001, "▏"), (0.5, "████"), (0.5625, "████▌"), (1.0, "████████")]
)
def test_bars(share: float, bar: str) -> None:
    assert bars.filled(share, 8) == bar


def _gauge(parts: list[int], limit: int) -> str:
    gauge = bars.Gauge(parts=[(part, f"color({i + 1})") for i, part in enumerate(parts)], limit=limit)
    return paper.render(gauge, Stream())


def test_the_gauge_is_to_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert _gauge([5, 5], 20) == "██████████··········"
    assert _gauge([20, 20], 20) == "██████████┃█████████"
    assert _gauge([20], 20) == "█" * 20
    assert _gauge([], 0) == "·" * 20


def test_one_unit_for_a_column() -> None:
    assert words.sizes([3 * GIB, 2**20, 2**28, 0]) == ["3.00 GiB", "<0.01 GiB", "0.25 GiB", "0.00 GiB"]
    assert words.sizes([100, 7]) == ["100 B", "7 B"]
    assert words.sizes([]) == []


def test_small_words() -> None:
    assert [words.percent(x, 1) for x in (0, 0.00001, 0.0006, 0.041, 0.42)] == [
        "0.00 %", "<0.01 %", "0.06 %", "4.1 %", "42 %",
    ]  # fmt: skip
    assert [words.usd(x) for x in (0.00123, 0.69, 1234.5)] == ["$0.00123", "$0.69", "$1,234"]
    assert [words.seconds(x) for x in (0.00123, 0.5, 12.0)] == ["0.0012 s", "500 ms", "12.00 s"]
    assert [words.flop(x) for x in (0, 10**12)] == ["0 FLOP", "1.00 TFLOP"]
    assert [words.value_text(x) for x in (None, True, ["a", 1], 8192, "x\x1b")] == [
        "unknown", "true", "a, 1", "8,192", "x?",
    ]  # fmt: skip


def test_explain_shows_every_term_with_its_source_and_the_sum() -> None:
    answer, terms = sample.estimate(), sample.terms()
    text = paper.render(ledger.render(answer, terms, sample.savings()), Stream())
    for term in terms:
        assert term.name in text
        assert term.source in text
    assert "sum 7,628,914,688 bytes = the peak, in backward" in text
    assert "context_bytes = 591.28 MiB" in text
    assert "time.step_seconds = unknown" in text


def test_explain_says_when_the_terms_are_not_the_peak() -> None:
    text = paper.render(ledger.render(sample.estimate(), sample.terms()[:1], ()), Stream())
    assert "sum 3,238,002,688 bytes · the peak is 7,628,914,688 bytes" in text
    assert "nothing that peftplan knows of" in text


def test_the_common_cards_are_in_the_catalog_by_their_own_name() -> None:
    from peftplan.hardware.common import COMMON, common_gpus

    assert [gpu.name for gpu in common_gpus().values()] == list(COMMON)
    sizes = [card.usable_bytes for card in cards.common()]
    assert sizes == sorted(sizes)
    assert len(sizes) == len(COMMON)


@pytest.mark.parametrize(("what", "like", "says"), [("models", "llama-2-7b", "6.74 B"), ("gpus", "4090", "24 GB")])
def test_catalog_lists_are_filtered_and_shown(what: str, like: str, says: str) -> None:
    rows = lists.rows(what, like)
    text = paper.render(tables.render(what, rows), Stream())
    assert 0 < len(rows) < 20
    assert says in text
    assert text.endswith(f"{len(rows)} {what}")
    assert paper.render(tables.render(what, []), Stream()) == f"no {what} match"


@pytest.mark.parametrize("what", ["methods", "formats", "optimizers", "trainers", "launchers"])
def test_plug_ins_describe_themselves(what: str) -> None:
    rows = lists.rows(what)
    assert rows
    assert all(row["about"] for row in rows)
