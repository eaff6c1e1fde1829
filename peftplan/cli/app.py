"""The commands under one name. Importing this imports typer, and none of what the commands call."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from peftplan.cli import accuracy, check, compare, estimate, explain, export, listing, plan, profile
from peftplan.cli.options import Sections

UsageError = cast("type[Exception]", typer.BadParameter.__base__)
"""What a wrong command line raises; its home module moved between versions of typer."""

app = typer.Typer(
    name="peftplan",
    help="Will this fine-tune fit, and why? Answered without a GPU.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("estimate", cls=Sections)(estimate.command)
app.command("explain", cls=Sections)(explain.command)
app.command("export", cls=Sections)(export.command)
app.command("check", cls=Sections)(check.command)
app.command("compare", cls=Sections)(compare.command)
app.command("plan", cls=Sections)(plan.command)
app.command("profile", cls=Sections)(profile.command)
app.command("accuracy", cls=Sections)(accuracy.command)
app.command("list")(listing.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peftplan {_version()}")
        raise typer.Exit


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("peftplan")
    except PackageNotFoundError:
        return "(not installed)"


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - typer calls back on it
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Will this fine-tune fit, and why? Answered without a GPU."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
