"""`peftplan check`: configurations against their budgets, for pull requests and CI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftplan.cli import complete
from peftplan.cli.options import FILES, LIMITS, Json
from peftplan.cli.output import Reply

if TYPE_CHECKING:
    from peftplan.budget import Check, Limits

MOST_WORKERS = 8


def _limit(flag: str, metavar: str, help_text: str, completion: Any = None) -> Any:
    return typer.Option(flag, metavar=metavar, help=help_text, rich_help_panel=LIMITS, autocompletion=completion)


def command(
    configs: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG...", help="Job files or trainers' configs; without any, all budgets."),
    ] = None,
    *,
    gpu: Annotated[str | None, _limit("--gpu", "NAME", "Card that it must fit on.", complete.gpus)] = None,
    accept: Annotated[
        str | None, _limit("--accept", "VERDICT", "Worst verdict that passes: fits or tight. Default tight.")
    ] = None,
    max_memory: Annotated[str | None, _limit("--max-memory", "SIZE", "Of one device: 24GB, 23.5GiB.")] = None,
    max_usd: Annotated[str | None, _limit("--max-usd", "USD", "Of the whole run.")] = None,
    max_hours: Annotated[str | None, _limit("--max-hours", "HOURS", "Of the whole run.")] = None,
    max_growth: Annotated[
        str | None, _limit("--max-growth", "SIZE", "Of the memory since --base: 5% or 500MiB.")
    ] = None,
    tokens: Annotated[
        str | None, _limit("--tokens", "N", "Tokens of the whole run, where the config does not say.")
    ] = None,
    usd_per_hour: Annotated[
        str | None, _limit("--usd-per-hour", "USD", "Price of one GPU, where the config does not say.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="REV", help="Git revision to compare with.", rich_help_panel=FILES),
    ] = None,
    budgets: Annotated[
        Path | None,
        typer.Option(
            "--budgets",
            metavar="FILE",
            help="Budget file; else the nearest peftplan.toml or pyproject.toml.",
            rich_help_panel=FILES,
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown table.", rich_help_panel=FILES)
    ] = False,
    json: Json = False,
) -> Reply:
    """Which configurations keep within their budgets; exit code 1 where one does not."""
    from peftplan.budget import check

    stated = {
        "gpu": gpu, "accept": accept, "max_memory": max_memory, "max_usd": max_usd, "max_hours": max_hours,
        "max_growth": max_growth, "tokens": tokens, "usd_per_hour": usd_per_hour,
    }  # fmt: skip
    result = check(*(configs or ()), limits=_limits(stated), budgets=budgets, base=base, workers=_cores())
    return Reply(text=_text(result, _style(json, markdown)), exit_code=result.exit_code, complaint=_complaint(result))


def _cores() -> int:
    return min(os.cpu_count() or 1, MOST_WORKERS)


def _limits(stated: dict[str, str | None]) -> Limits | None:
    from peftplan.budget.limits import OPTIONS, make_limits

    given = {key: value for key, value in stated.items() if value is not None}
    return make_limits(given, where=OPTIONS) if given else None


def _style(json: bool, markdown: bool) -> str:
    return "json" if json else "markdown" if markdown else "text"


def _text(result: Check, style: str) -> str:
    from peftplan.cli.output import as_json, as_rows

    if style == "json":
        return as_json(result)
    from peftplan.report import budgets

    return budgets.markdown(result) if style == "markdown" else as_rows(budgets.render(result))


def _complaint(result: Check) -> str:
    """One line for stderr where something could not be judged."""
    errors = [r.error for r in result.results if r.error is not None]
    if not errors:
        return ""
    return (
        errors[0] if len(errors) == 1 else f"{len(errors)} configurations could not be judged; the first: {errors[0]}"
    )
