"""Bars that fill the room they are given, to an eighth of a character, and columns that stack where it is narrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_EIGHTHS = " ▏▎▍▌▋▊▉"
_PASSED = "bold white on #b3364b"


def filled(share: float, width: int) -> str:
    """A bar of `share` (0 to 1) of `width` characters; anything above nothing shows at least a sliver."""
    eighths = min(round(share * width * 8), width * 8)
    if share > 0 and eighths == 0:
        eighths = 1
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """`share` of the column's width in `style`."""

    share: float
    style: str
    widest: int = 40

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(filled(self.share, min(options.max_width, self.widest)), style=self.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(4, min(self.widest, options.max_width))


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """Coloured parts side by side against a `limit`: room left is dotted, a limit passed is marked."""

    parts: Sequence[tuple[int, str]]
    limit: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        runs = groupby(self._cells(options.max_width))
        yield Text.assemble(*((cell * sum(1 for _ in run), style) for (cell, style), run in runs))

    def _cells(self, width: int) -> list[tuple[str, str]]:
        total = sum(amount for amount, _ in self.parts)
        full = max(total, self.limit, 1)
        line = self.limit * width // full if total > self.limit else None
        cells, alive = [], 0
        for amount, style in self.parts:
            edge, alive = round(alive * width / full), alive + amount
            cells += [("█", style)] * (round(alive * width / full) - edge)
        cells += [("·", "bright_black")] * (width - len(cells))
        if line is not None:
            cells[line] = ("┃", _PASSED)
        return cells

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(10, options.max_width)


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Two parts side by side, 3 to 2; one above the other where there are fewer than `least` columns."""

    left: RenderableType
    right: RenderableType
    least: int = 72

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < self.least:
            yield from (self.left, Text(), self.right)
            return
        grid = Table.grid(padding=(0, 4), expand=True)
        grid.add_column(ratio=3)
        grid.add_column(ratio=2)
        grid.add_row(self.left, self.right)
        yield grid
