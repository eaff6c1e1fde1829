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
        ("parameters", ours["parameters"]["total"], traced["parameters"]["total"]),
        *((_label(name), ours["parameters"][name], traced["parameters"][name]) for name in _COUNTS),
        *((_label(name), ours["memory"][name], traced[name]) for name in memory),
        *((f"{name} FLOPs", ours["flops"][name], traced["flops"][name]) for name in ours["flops"]),
    ]


_COUNTS = ("trainable", "stored_bytes")


def _label(name: str) -> str:
    return name.replace("_", " ")


def _difference(ours: int, theirs: int) -> Text:
    if ours == theirs:
        return Text("equal", style="#56b870")
    share = 100 * (ours - theirs) / theirs if theirs else 0.0
    return Text(f"{share:+.2f} %" if abs(share) >= 0.01 else f"{ours - theirs:+,}", style="#e9a23b")
