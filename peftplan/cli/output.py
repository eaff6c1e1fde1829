"""Text for stdout: one JSON object, or a report sized and coloured for where it is read."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from rich.console import RenderableType


def as_json(document: BaseModel | dict[str, Any]) -> str:
    """One JSON object in ASCII, readable by any terminal and any parser."""
    if isinstance(document, BaseModel):
        document = document.model_dump(mode="json", by_alias=True)
    return json.dumps(document, indent=2, allow_nan=False)


def as_text(report: RenderableType) -> str:
    """`report` for the terminal that stdout is, or plain text for a pipe or a file."""
    from peftplan.report import paper

    return paper.render(report, stream=sys.stdout)
