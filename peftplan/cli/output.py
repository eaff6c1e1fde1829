"""Text for stdout: one JSON object, or a report sized and coloured for where it is read."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A report of a command that ends with a code of its own, and one line for stderr where there is one."""

    text: str
    exit_code: int
    complaint: str = ""


def as_json(document: BaseModel | dict[str, Any]) -> str:
    """One JSON object in ASCII, readable by any terminal and any parser."""
    if isinstance(document, BaseModel):
        document = document.model_dump(mode="json", by_alias=True)
    return json.dumps(document, indent=2, allow_nan=False)


def as_text(report: RenderableType) -> str:
    """`report` for the terminal that stdout is, or plain text for a pipe or a file."""
    from peftplan.report import paper

    return paper.render(report, stream=sys.stdout)


UNFOLDED = 1000
"""Columns that no row of a list reaches."""


def as_rows(table: RenderableType) -> str:
    """`table` like a report; in a pipe without a width of its own (COLUMNS) every row is one line, for grep and awk."""
    from peftplan.report import paper

    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return paper.render(table, stream=sys.stdout, width=UNFOLDED if piped else None)
