"""`peftplan profile --device cuda` for people: a run beside what was predicted, and what became of a campaign."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftplan.accuracy import Row, compare
from peftplan.records import Record
from peftplan.report import words
from peftplan.report.screen import heading
from peftplan.result import Estimate
from peftplan.units import format_bytes

if TYPE_CHECKING:
    from peftplan.instruments.campaign_run import Outcome, Report

_DIM = "bright_black"
_NAMES = {
    "allocated_peak": "allocated, peak",
    "reserved_peak": "reserved",
    "device": "on the card",
    "allocated_resident": "model and adapter",
    "allocated_between_steps": "between steps",
    "allocated_peak_load": "peak of loading",
    "allocated_peak_forward": "peak of forward",
    "allocated_peak_loss": "peak of the loss",
    "allocated_peak_backward": "peak of backward",
    "allocated_peak_optimizer": "peak of the optimizer",
}


def render(record: Record, predicted: Estimate, problems: Iterable[str] = ()) -> RenderableType:
    """One row per kind of memory that was read."""
    title = heading(f"A run on {record.gpu}", words.headline(predicted.job))
    lines: list[RenderableType] = [Text(), title]
    if record.out_of_memory:
        phase = record.run.failed_in if record.run is not None else None
        lines.append(Text(f"ran out of memory in {phase or 'the run'}; {_asked(predicted)} were predicted"))
    else:
        lines += [_table(compare([record], lambda _job: predicted, every_value=True)), _speed(record, predicted)]
    warnings = [Text(f"warning: {problem}") for problem in problems]
    return Group(*lines, *warnings, Text(record.versions, style=_DIM), Text())


def _asked(predicted: Estimate) -> str:
    found = predicted.memory.device_bytes or predicted.memory.peak_bytes
    return format_bytes(found)


def _table(rows: list[Row]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    for _ in range(3):
        table.add_column(justify="right")
    table.add_row("", *(Text(name, style="bold") for name in ("predicted", "measured", "difference")))
    for row in rows:
        ours = "?" if row.predicted_bytes is None else format_bytes(row.predicted_bytes)
        table.add_row(_NAMES[row.kind], ours, format_bytes(row.measured_bytes), _difference(row))
    return table


def _difference(row: Row) -> str:
    if row.error is None:
        return ""
    return "equal" if row.predicted_bytes == row.measured_bytes else f"{100 * row.error:+.2f} %"


def _speed(record: Record, predicted: Estimate) -> Text:
    seconds = record.run.step_seconds if record.run is not None else ()
    if not seconds:
        return Text()
    expected = predicted.time.step_seconds
    said = f"; {expected.expected:.3f} s were predicted" if expected is not None else ""
    return Text(f"a step took {min(seconds):.3f} to {max(seconds):.3f} s{said}")


# -- a campaign -------------------------------------------------------------------------------------------------------


def summary(report: Report) -> RenderableType:
    """One row per run."""
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "left", "right", "right"):
        table.add_column(justify=justify)
    table.add_row(*(Text(name, style="bold") for name in ("run", "", "peak", "seconds")))
    for outcome in report.outcomes:
        table.add_row(outcome.name, _status(outcome), _peak(outcome), f"{outcome.seconds:.1f}")
    counts = ", ".join(
        f"{report.count(status)} {status}" for status in dict.fromkeys(o.status for o in report.outcomes)
    )
    lines = [Text(f"warning: {problem}") for problem in report.problems]
    return Group(Text(), table, Text(), *lines, Text(f"{counts}; records in {report.path}"), Text())


def _status(outcome: Outcome) -> str:
    return f"{outcome.status}: {outcome.error}" if outcome.error else outcome.status


def _peak(outcome: Outcome) -> str:
    measured = outcome.record.measured if outcome.record is not None else ()
    return format_bytes(measured[0].bytes) if measured else ""
