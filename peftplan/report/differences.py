"""`peftplan compare` for people: the choices that differ, then what they do, one column per job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftplan.differences import Choice, Comparison, Quantity, Unit, Value
from peftplan.report import words
from peftplan.report.screen import heading
from peftplan.units import format_bytes, format_count

_LABELS = {
    "parameters.total": "parameters",
    "parameters.trainable": "trained",
    "memory.device_bytes": "on the card",
    "memory.saved_for_backward_bytes": "kept for backward",
    "memory.static_bytes": "between steps",
    "time.step_seconds.expected": "seconds per step",
    "cost.usd_total": "whole run",
    "cost.energy_kwh": "energy",
}


def render(comparison: Comparison) -> RenderableType:
    """Both tables; a value that is not the first job's has its difference beside it."""
    differs = Group(Text(), heading("What differs"), _question(comparison))
    return Group(differs, Text(), heading("What that does"), _answer(comparison), Text())


def _table(comparison: Comparison) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    for _ in comparison.names:
        table.add_column(justify="right", overflow="fold")
    table.add_row("", *(Text(words.printable(name), style="bold") for name in comparison.names))
    return table


def _question(comparison: Comparison) -> RenderableType:
    if not comparison.question:
        return Text("nothing: the jobs ask the same")
    table = _table(comparison)
    for choice in comparison.question:
        table.add_row(words.printable(choice.field), *_choices(choice))
    return table


def _choices(choice: Choice) -> list[Text]:
    first = choice.values[0]
    return [
        Text("-" if value is None else words.value_text(value), style="" if value == first else "#e9a23b")
        for value in choice.values
    ]


def _answer(comparison: Comparison) -> RenderableType:
    table = _table(comparison)
    same = 0
    for quantity in comparison.answer:
        if any(value != quantity.values[0] for value in quantity.values):
            table.add_row(_label(quantity.name), *_values(quantity))
        else:
            same += 1
    return Group(table, Text(f"{same} more are equal", style="bright_black")) if same else table


def _label(name: str) -> str:
    last = name.rpartition(".")[2].removesuffix("_bytes").replace("_", " ")
    if name.startswith("memory.at_peak."):
        return f"  {words.label(name.rpartition('.')[2])} at the peak"
    if name.startswith("flops."):
        return f"{last} FLOPs"
    return _LABELS.get(name, last)


def _values(quantity: Quantity) -> list[Text]:
    return [
        Text.assemble(_shown(value, quantity.unit), ("  " + _change(delta, quantity), "#e9a23b") if delta else "")
        for value, delta in zip(quantity.values, quantity.deltas, strict=True)
    ]


def _shown(value: Value, unit: Unit) -> str:
    if value is None or isinstance(value, str):
        return "unknown" if value is None else value.replace("_", " ")
    return _SHOWN[unit](value)


_SHOWN: dict[Unit, Callable[[Any], str]] = {
    "bytes": lambda value: format_bytes(int(value)),
    "flops": words.flop,
    "count": format_count,
    "seconds": words.seconds,
    "usd": words.usd,
    "kwh": "{:,.1f} kWh".format,
    "share": "{:.1%}".format,
    "tokens per second": "{:,.0f}".format,
    "": str,
}


def _change(delta: float, quantity: Quantity) -> str:
    sign = "+" if delta > 0 else "−"
    if quantity.unit == "bytes":
        return sign + format_bytes(int(abs(delta)))
    first = quantity.values[0]
    share = 100 * abs(delta) / first if isinstance(first, (int, float)) and first > 0 else None
    return f"{sign}{_SHOWN[quantity.unit](abs(delta))}" if share is None else f"{sign}{share:.3g} %"
