"""`peftplan list WHAT [LIKE]`: the names that peftplan knows."""

from __future__ import annotations

from typing import Annotated

import typer

from peftplan.cli import complete
from peftplan.cli.options import Json
from peftplan.errors import UnknownName

KINDS = ("models", "gpus", "methods", "formats", "optimizers", "trainers", "launchers")


def command(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="One of " + ", ".join(KINDS) + ".", autocompletion=complete.listable),
    ],
    like: Annotated[str, typer.Argument(metavar="LIKE", help="Only names that hold this text.")] = "",
    *,
    json: Json = False,
) -> str:
    """The models, GPUs, methods, formats, optimizers, trainers or launchers that peftplan knows."""
    if what not in KINDS:
        raise UnknownName("list", what, KINDS)
    from peftplan.report import lists

    rows = lists.rows(what, like)
    if json:
        from peftplan.cli.output import as_json

        return as_json({"schema": "peftplan.list/1", "what": what, "items": rows})
    from peftplan.cli.output import as_rows
    from peftplan.report import tables

    return as_rows(tables.render(what, rows))
