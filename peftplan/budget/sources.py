"""Where a configuration under a budget comes from: a file, a table of the budget file, or Python."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peftplan import datafile
from peftplan.errors import BadFile
from peftplan.job import Job
from peftplan.questions import read_job


@dataclass(frozen=True, kw_only=True)
class Source:
    """A configuration: its name in reports, the file that holds it (None: it has none), and how its text is read."""

    name: str
    path: Path | None
    read: Callable[[str], Job]
    """The Job that a text of the file states. Raises PeftplanError."""

    def text(self) -> str:
        return "" if self.path is None else datafile.text_of(self.path)


def of_file(path: Path) -> Source:
    near = Path(shown(path))
    return Source(name=str(near), path=near, read=lambda text: read_job(near, text=text))


def of_job(job: Job) -> Source:
    return Source(name=job.model, path=None, read=lambda _: job)


def of_nothing(name: str, problem: str) -> Source:
    """A configuration that is not there."""

    def read(_: str) -> Job:
        raise BadFile(problem)

    return Source(name=name, path=None, read=read)


def shown(path: Path) -> str:
    """`path` as one would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else Path(relative).as_posix()
