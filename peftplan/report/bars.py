"""Bars that fill the room they are given, to an eighth of a character."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

_EIGHTHS = " ▏▎▍▌▋▊▉"
_EMPTY = "·"


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
    """Coloured parts side by side on a scale of `full`; what overflows `full` is cut at the edge."""

    parts: Sequence[tuple[int, str]]
    full: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        edge, total = 0, 0
        for amount, style in self.parts:
            total += amount
            reach = min(round(total * width / self.full), width)
            yield Segment("█" * (reach - edge), Style.parse(style))
            edge = max(edge, reach)
        yield Segment(_EMPTY * (width - edge), Style.parse("bright_black"))
        yield Segment.line()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(10, options.max_width)
