"""`peftplan accuracy`: every measurement in profiles/ beside today's prediction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftplan.cli.options import FILES, Json
from peftplan.errors import RequestError

if TYPE_CHECKING:
    from peftplan.accuracy import Row
    from peftplan.records import Loaded

WHICH = "Which"
MOST_PROBLEMS = 5


def _flag(flag: str, help_text: str, panel: str = WHICH) -> Any:
    return typer.Option(flag, help=help_text, rich_help_panel=panel)


def _text(flag: str, help_text: str) -> Any:
    return typer.Option(flag, metavar="TEXT", help=help_text, rich_help_panel=WHICH)


def command(
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="Folder of records (*.jsonl); else profiles/.")
    ] = None,
    *,
    match: Annotated[str, _text("--match", "Only records whose id contains this.")] = "",
    source: Annotated[str, _text("--source", "Only measurements of this publisher (a part of its name).")] = "",
    kind: Annotated[str, _text("--kind", "Only one kind of memory: allocated_peak, reserved_peak, device, ...")] = "",
    every_value: Annotated[bool, _flag("--every-value", "All values of a record, not only its first.")] = False,
    by: Annotated[str, _text("--by", "Errors of groups, not rows: kind, method, format, layout, gpu, source.")] = "",
    explain: Annotated[
        str, _text("--explain", "Open one record: its run, its values, the terms of the prediction.")
    ] = "",
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Also draw predicted against measured (.svg, .png).", rich_help_panel=FILES),
    ] = None,
    judged: Annotated[bool, _flag("--judged", "Leave out what is not modelled or refused.")] = False,
    markdown: Annotated[bool, _flag("--markdown", "Print a Markdown table.", FILES)] = False,
    json: Json = False,
) -> str:
    """Every measurement in profiles/ beside today's prediction, and the errors."""
    from peftplan.accuracy import compare
    from peftplan.pipeline import estimate
    from peftplan.report.accuracy_text import group_table, table

    _known_kind(kind)
    _known_group(by)
    loaded = _loaded(folder)
    if explain:
        return _explained(loaded, explain, json=json)
    wanted = [record for record in loaded if match in record.id]
    rows = compare(wanted, estimate, every_value=every_value or bool(kind))
    rows = [row for row in rows if kind in ("", row.kind) and source.lower() in row.source.lower()]
    if not rows:
        raise RequestError(f"none of the {len(loaded)} records match --match, --source and --kind")
    shown = [row for row in rows if row.error is not None] if judged else rows
    if plot is not None:
        _draw(rows, plot)
    if json:
        return _json(shown, loaded, by)
    text = group_table(shown, by) if by else table(shown, style="markdown" if markdown else "text")
    return "\n".join([text, *_problems(loaded)])


def _loaded(folder: Path | None) -> Loaded:
    from peftplan.records import load

    loaded = load(_folder(folder))
    if not loaded.records:
        raise RequestError("; ".join([f"{_folder(folder)} holds no records", *loaded.problems[:1]]))
    return loaded


def _explained(loaded: Loaded, name: str, *, json: bool) -> str:
    """One record opened. UnknownName for an id that no record has."""
    from peftplan.cli.output import as_json, as_text
    from peftplan.errors import UnknownName
    from peftplan.report import accuracy_record

    records = {record.id: record for record in loaded}
    if name not in records:
        raise UnknownName("record", name, records)
    return as_json(accuracy_record.document(records[name])) if json else as_text(accuracy_record.render(records[name]))


def _draw(rows: list[Row], target: Path) -> None:
    from peftplan.report.accuracy_plot import draw

    draw(rows, target)


def _problems(loaded: Loaded) -> list[str]:
    more = len(loaded.problems) - MOST_PROBLEMS
    shown = [f"problem: {problem}" for problem in loaded.problems[:MOST_PROBLEMS]]
    return [*shown, f"problem: {more} more lines are no records"] if more > 0 else shown


def _known_kind(kind: str) -> None:
    from typing import get_args

    from peftplan.errors import UnknownName
    from peftplan.records import MemoryKind

    if kind and kind not in get_args(MemoryKind):
        raise UnknownName("--kind", kind, get_args(MemoryKind))


def _known_group(by: str) -> None:
    from peftplan.accuracy import GROUPS
    from peftplan.errors import UnknownName

    if by and by not in GROUPS:
        raise UnknownName("--by", by, GROUPS)


def _folder(given: Path | None) -> Path:
    """The folder of records: as given, here, or beside a checkout's package."""
    if given is not None:
        return given
    for place in (Path("profiles"), Path(__file__).resolve().parents[2] / "profiles"):
        if place.is_dir():
            return place
    raise RequestError(
        "no profiles/ here, and the installed package holds no records; give the folder: "
        "`peftplan accuracy path/to/a/checkout/profiles`"
    )


def _json(rows: list[Row], loaded: Loaded, by: str) -> str:
    from dataclasses import asdict

    from peftplan.accuracy import grouped, summarize
    from peftplan.cli.output import as_json

    return as_json(
        {
            "schema": "peftplan.accuracy/1",
            "summary": asdict(summarize(rows)),
            "groups": {name: asdict(summarize(group)) for name, group in grouped(rows, by).items()} if by else {},
            "rows": [{**asdict(row), "error": row.error} for row in rows],
            "problems": list(loaded.problems),
        }
    )
