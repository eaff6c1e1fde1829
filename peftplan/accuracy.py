"""Predicted against measured, record by record, each number with the kind of memory it counts.

`python -m peftplan.accuracy profiles/published` prints the table of every record there.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from peftplan.errors import PeftplanError
from peftplan.job import Job
from peftplan.records import Measured, Record, load
from peftplan.result import Estimate
from peftplan.units import GIB

Predict = Callable[[Job], Estimate]
Style = Literal["text", "markdown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured value beside its prediction; `predicted_bytes` is None where `note` says why."""

    id: str
    kind: str
    measured_bytes: int
    predicted_bytes: int | None
    note: str = ""
    source: str = ""
    """Who measured it."""
    why_off: str = ""

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured: negative means the prediction is under."""
        if self.predicted_bytes is None:
            return None
        return self.predicted_bytes / self.measured_bytes - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Of the judged rows; all errors are fractions."""

    rows: int
    judged: int
    median_abs: float | None
    worst_under: float | None
    worst_over: float | None
    under_5_percent: int


def compare(records: Iterable[Record], predict: Predict, *, every_value: bool = False) -> list[Row]:
    """Each record's first measured value (or every value) beside `predict` of its job."""
    rows: list[Row] = []
    seen: dict[str, Estimate] = {}

    def once(job: Job) -> Estimate:
        key = job.model_dump_json()
        if key not in seen:
            seen[key] = predict(job)
        return seen[key]

    for record in records:
        values = record.measured if every_value else record.measured[:1]
        rows += _record_rows(record, values, once)
    return rows


def _record_rows(record: Record, values: Iterable[Measured], predict: Predict) -> list[Row]:
    if record.gaps:
        return [_row(record, value, None, "not modelled: " + "; ".join(record.gaps)) for value in values]
    try:
        estimate = predict(record.to_job())
    except PeftplanError as error:
        return [_row(record, value, None, f"refused: {error}") for value in values]
    return [_judge(record, value, estimate) for value in values]


def _judge(record: Record, value: Measured, estimate: Estimate) -> Row:
    predicted = predicted_bytes(estimate, value)
    if predicted is None:
        return _row(record, value, None, "the estimate leaves this open")
    return _row(record, value, predicted, value.beyond_model_why or "")


def _row(record: Record, value: Measured, predicted: int | None, note: str) -> Row:
    return Row(
        id=record.id,
        kind=value.kind,
        measured_bytes=value.bytes,
        predicted_bytes=predicted,
        note=note,
        source=_publisher(record.source),
        why_off=value.why_off or "",
    )


def _publisher(source: str) -> str:
    """The repository or package that a record's source names."""
    found = re.search(r"github\.com/([^/]+/[^/]+)", source)
    return found[1] if found else source.split(":")[0].removeprefix("PyPI ").removesuffix(" sdist")


def predicted_bytes(estimate: Estimate, value: Measured) -> int | None:
    """The field of `estimate` that counts what `value` counts, plus what no job describes."""
    memory, phases = estimate.memory, estimate.memory.phases
    forward = max(phases.get("forward", 0), phases.get("loss", 0))
    found = {
        "allocated_peak": memory.peak_bytes,
        "reserved_peak": memory.reserved_bytes,
        "device": memory.device_bytes,
        "allocated_resident": estimate.parameters.stored_bytes,
        "allocated_between_steps": memory.static_bytes,
        "allocated_peak_forward": forward or None,
        "allocated_peak_backward": phases.get("backward"),
        "allocated_peak_optimizer": phases.get("optimizer"),
    }[value.kind]
    return None if found is None else found + value.beyond_model_bytes


def summarize(rows: Iterable[Row]) -> Summary:
    """Median and extremes of the errors of `rows`."""
    rows = list(rows)
    errors = [row.error for row in rows if row.error is not None]
    return Summary(
        rows=len(rows),
        judged=len(errors),
        median_abs=statistics.median(map(abs, errors)) if errors else None,
        worst_under=min(errors) if errors else None,
        worst_over=max(errors) if errors else None,
        under_5_percent=sum(error < -0.05 for error in errors),
    )


_HEADS = ("record", "memory", "measured GiB", "predicted GiB", "error", "note")


def table(rows: Iterable[Row], *, style: Style = "text") -> str:
    """The rows as an aligned text table or a markdown table, with the summary below."""
    rows = list(rows)
    cells = [_cells(row) for row in rows]
    lines = _markdown(cells) if style == "markdown" else _text(cells)
    return "\n".join([*lines, "", summary_line(summarize(rows))])


def _cells(row: Row) -> tuple[str, ...]:
    predicted = "-" if row.predicted_bytes is None else f"{row.predicted_bytes / GIB:.3f}"
    error = "-" if row.error is None else f"{row.error:+.1%}"
    return row.id, row.kind, f"{row.measured_bytes / GIB:.3f}", predicted, error, row.note


def _text(cells: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[i]) for line in [_HEADS, *cells]) for i in range(5)]
    return [_aligned(line, widths).rstrip() for line in [_HEADS, *cells]]


def _aligned(line: tuple[str, ...], widths: list[int]) -> str:
    left = (line[i].ljust(widths[i]) for i in (0, 1))
    right = (line[i].rjust(widths[i]) for i in (2, 3, 4))
    return "  ".join([*left, *right, line[5]])


def _markdown(cells: list[tuple[str, ...]]) -> list[str]:
    rule = "|---|---|---:|---:|---:|---|"
    body = ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in cells]
    return ["| " + " | ".join(_HEADS) + " |", rule, *body]


def summary_line(summary: Summary) -> str:
    """The summary in one sentence."""
    if summary.median_abs is None or summary.worst_under is None or summary.worst_over is None:
        return f"{summary.rows} values, none of them judged"
    return (
        f"{summary.judged} of {summary.rows} values judged: median absolute error {summary.median_abs:.2%}, "
        f"lowest {summary.worst_under:+.1%}, highest {summary.worst_over:+.1%}, "
        f"{summary.under_5_percent} under by more than 5%"
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 when the folder cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m peftplan.accuracy", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--match", default="", help="only records whose id contains this")
    parser.add_argument("--every-value", action="store_true", help="all measured values, not only the first")
    parser.add_argument("--judged", action="store_true", help="leave out what is not modelled or refused")
    parser.add_argument("--style", choices=["text", "markdown"], default="text")
    args = parser.parse_args(argv)
    from peftplan.pipeline import estimate

    try:
        loaded = load(args.folder)
    except PeftplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    chosen = [record for record in loaded if args.match in record.id]
    rows = compare(chosen, estimate, every_value=args.every_value)
    shown = [row for row in rows if row.error is not None] if args.judged else rows
    print(table(shown, style=args.style))
    for problem in loaded.problems:
        print(f"problem: {problem}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
