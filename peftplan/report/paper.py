"""What every report is printed on: width, colour and alphabet of the place that will show it."""

from __future__ import annotations

from typing import IO

from rich.console import Console, RenderableType

MAX_WIDTH = 100
"""Lines longer than this are hard to read, however wide the terminal."""

_PLAIN = str.maketrans(
    {
        "█": "#", "▉": "#", "▊": "#", "▋": "#", "▌": "=", "▍": "-", "▎": "-", "▏": " ", "■": "#",
        "✓": "+", "✗": "x", "◀": "<", "→": ">", "−": "-", "–": "-", "—": "-", "·": ".", "×": "x",
        "≤": "<", "≥": ">", "…": "~", "─": "-", "┃": "|", "²": "2", "½": "~",
    }
)  # fmt: skip


def render(report: RenderableType, stream: IO[str], *, width: int | None = None) -> str:
    """`report` as text for `stream`: coloured on a terminal (NO_COLOR respected), plain in a pipe; as wide as
    `width`, or as the terminal."""
    console = Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=False)
    console.width = min(console.width, MAX_WIDTH) if width is None else width
    with console.capture() as captured:
        console.print(report)
    text = "\n".join(line.rstrip() for line in captured.get().splitlines())
    return text if console.encoding.startswith("utf") else plain(text)


def plain(text: str) -> str:
    """`text` with ASCII in place of every glyph the reports use, column by column."""
    return text.translate(_PLAIN).encode("ascii", "replace").decode()
