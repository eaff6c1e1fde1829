"""`peftplan profile` for people: what was predicted beside what the real model did."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftplan.report import words
from peftplan.report.screen import heading
from peftplan.result import Estimate


def render(predicted: Estimate, traced: dict[str, Any]) -> RenderableType:
    """One row per quantity that the estimate and the trace both have."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    for _ in range(3):
        table.add_column(justify="right")
    table.add_row("", *(Text(title, style="bold") for title in ("predicted", "traced", "difference")))
    for name, ours, theirs in _pairs(predicted, traced):
        table.add_row(name, f"{ours:,}", f"{theirs:,}", _difference(ours, theirs))
    versions = ", ".join(f"{name} {version}" for name, version in traced["versions"].items())
    title = heading("One step of the real model", words.headline(predicted.job))
    return Group(Text(), title, table, Text(versions, style="bright_black"), Text())


def _pairs(predicted: Estimate, traced: dict[str, Any]) -> list[tuple[str, int, int]]:
    ours = predicted.model_dump()
    memory = ("static_bytes", "saved_for_backward_bytes", "peak_bytes")
    return [
        *((name, ours["parameters"][name], traced["parameters"][name]) for name in ours["parameters"]),
        *((name, ours["memory"][name], traced[name]) for name in memory),
        *((f"{name} FLOPs", ours["flops"][name], traced["flops"][name]) for name in ours["flops"]),
    ]


def _difference(ours: int, theirs: int) -> Text:
    if ours == theirs:
        return Text("equal", style="#56b870")
    if theirs == 0:
        return Text(f"{ours - theirs:+,}", style="#e9a23b")
    return Text(f"{100 * (ours - theirs) / theirs:+.2f} %", style="#e9a23b")
