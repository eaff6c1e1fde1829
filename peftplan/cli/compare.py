"""`peftplan compare`: jobs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftplan.cli.options import FILES, JobOptions, Json, takes_options
from peftplan.errors import RequestError
from peftplan.job import Job

if TYPE_CHECKING:
    from peftplan.differences import Comparison


@takes_options
def command(
    options: JobOptions,
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE...", help="Job files, estimates' JSON or trainers' configs."),
    ] = None,
    *,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="REV", help="Each file beside itself at a git revision.", rich_help_panel=FILES),
    ] = None,
    json: Json = False,
) -> str:
    """Two or more jobs side by side: what differs, and what that does.

    The options are laid over every file; with one file alone, over the second of the two that are compared.
    """
    from peftplan.cli.output import as_json, as_text

    found = _comparison(options, _all_files(options, files or []), base)
    if json:
        return as_json(found)
    from peftplan.report import differences

    return as_text(differences.render(found))


def _all_files(options: JobOptions, files: list[Path]) -> list[Path]:
    more = [*([options.job_file] if options.job_file else []), *(options.config_file or [])]
    if not files and not more:
        raise RequestError("name two files to compare, or one with --base REV or with the options that differ")
    return [*files, *more]


def _comparison(options: JobOptions, files: list[Path], base: str | None) -> Comparison:
    from peftplan.differences import named, of_jobs

    stated = named(files, base=base)
    if not options.said:
        return of_jobs(stated)
    if len(stated) == 1:
        name, job = stated[0]
        return of_jobs([(name, job), (options.said, _over(options, job))])
    return of_jobs([(name, _over(options, job)) for name, job in stated])


def _over(options: JobOptions, job: Job) -> Job:
    return options.over(job.model_dump(exclude_defaults=True, by_alias=True))
