"""Rows of predicted against measured as text or Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from peftplan.accuracy import Row, Summary, grouped, summarize
from peftplan.units import GIB

Style = Literal["text", "markdown"]
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


_GROUP_HEADS = ("values", "judged", "median", "p90", "lowest", "highest", "under by 5 %")


def group_table(rows: Iterable[Row], by: str) -> str:
    """One Markdown row of errors for each group, and one for all."""
    rows = list(rows)
    lines = ["| " + " | ".join((by, *_GROUP_HEADS)) + " |", "|---" + "|---:" * len(_GROUP_HEADS) + "|"]
    groups = [*grouped(rows, by).items(), ("all", rows)]
    return "\n".join([*lines, *(_group_line(name, summarize(group)) for name, group in groups)])


def _group_line(name: str, found: Summary) -> str:
    errors = (found.median_abs, found.p90_abs, found.worst_under, found.worst_over)
    shown = ("-" if e is None else format(e, ".2%" if i < 2 else "+.2%") for i, e in enumerate(errors))
    return f"| {name} | {found.rows} | {found.judged} | {' | '.join(shown)} | {found.under_5_percent} |"


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
        f"{summary.judged} of {summary.rows} values judged: median absolute error {summary.median_abs:.2%}, 9 in 10 "
        f"within {summary.p90_abs:.2%}, lowest {summary.worst_under:+.1%}, highest {summary.worst_over:+.1%}, "
        f"{summary.under_5_percent} under by more than 5%"
    )
