"""`peftplan list` for people: one table per kind of name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftplan.report import words
from peftplan.report.lists import Row
from peftplan.units import format_bytes, format_count

Column = tuple[str, bool, Callable[[Row], str]]
"""Heading, whether it is a number, and the text of a row's cell."""


def render(what: str, rows: Sequence[Row]) -> RenderableType:
    """`rows` as a table with a count below it."""
    if not rows:
        return Text(f"no {what} match")
    columns = _COLUMNS.get(what, _PLUGIN)
    table = Table.grid(padding=(0, 2))
    for _, number, _cell in columns:
        table.add_column(justify="right" if number else "left", overflow="fold")
    table.add_row(*(Text(title, style="bold") for title, _, _ in columns))
    for row in rows:
        table.add_row(*(Text(cell(row)) for _, _, cell in columns))
    return Group(table, Text(f"\n{len(rows)} {what}", style="bright_black"))


def _short(row: Row) -> str:
    """The name people type: the shortest alias, else the name itself."""
    return min(row["aliases"], key=len, default=str(row["name"]))


def _known(value: Any, show: Callable[[Any], str]) -> str:
    return "unknown" if value is None else show(value)


def _status(row: Row) -> str:
    if not row["modelled"]:
        return "not modelled yet"
    return "see caveat" if row["caveat"] else ""


_COLUMNS: dict[str, tuple[Column, ...]] = {
    "models": (
        ("type", False, _short),
        ("parameters", True, lambda row: format_count(row["parameters"])),
        ("family", False, lambda row: str(row["model_type"])),
        ("Hub id", False, lambda row: str(row["name"])),
        ("", False, _status),
    ),
    "gpus": (
        ("type", False, _short),
        ("memory", True, lambda row: f"{row['memory_bytes'] / 1e9:.0f} GB"),
        ("usable", True, lambda row: _known(row["usable_bytes"], format_bytes)),
        ("bf16 TFLOP/s", True, lambda row: _known(row["dense_tflops"].get("bf16"), "{:,.0f}".format)),
        ("per hour", True, lambda row: _known(row["usd_per_hour"], words.usd)),
        ("name", False, lambda row: str(row["name"])),
    ),
    "methods": (
        ("type", False, lambda row: str(row["name"])),
        ("family", False, lambda row: str(row["family"])),
        ("what it is", False, lambda row: str(row["about"])),
    ),
}
_PLUGIN: tuple[Column, ...] = (
    ("type", False, lambda row: str(row["name"])),
    ("what it is", False, lambda row: str(row["about"])),
)
