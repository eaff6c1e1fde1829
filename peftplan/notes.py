"""The notes that resolving a job takes."""

from __future__ import annotations

from typing import Any

from peftplan.job import Assumption


class Notes:
    """What was decided about a job that it leaves open, with the reasons."""

    def __init__(self) -> None:
        self.items: list[Assumption] = []

    def default(self, given: Any, what: str, value: Any, why: str) -> Any:
        """`given`, or the default with its reason noted."""
        if given is not None:
            return given
        self.items.append(Assumption(what=what, value=value, why=why))
        return value

    def add(self, what: str, value: Any, why: str) -> None:
        self.items.append(Assumption(what=what, value=value, why=why))
