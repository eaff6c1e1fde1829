"""How far a campaign is, on standard error: a bar on a terminal, a line for each run elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from peftplan.instruments.campaign_run import Outcome


class Bar:
    """A campaign's watcher."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._lines = Console(stderr=True, highlight=False, soft_wrap=True)
        self._task: TaskID | None = None
        self._at = ""

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def begins(self, name: str, number: int, total: int) -> None:
        if self._task is None:
            self._task = self._progress.add_task("", total=total)
        self._progress.update(self._task, description=name, completed=number - 1)
        self._at = f"{number}/{total}"

    def ends(self, outcome: Outcome) -> None:
        if self._task is not None:
            self._progress.advance(self._task)
        more = f": {outcome.error}" if outcome.error else ""
        console = self._lines if self._progress.disable else self._progress.console
        line = f"{self._at} {outcome.name}: {outcome.status}{more} ({outcome.seconds:.1f} s)"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
