"""`peftplan plan`: constraints -> ranked configurations, why the rest lost, what one notch more or less would buy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftplan.cli import complete
from peftplan.cli.export import Dataset, Launcher, Overwrite, Smoke, Trainer
from peftplan.cli.options import FILES, LIMITS, Json, Text, takes_job
from peftplan.job import Job

if TYPE_CHECKING:
    from peftplan.exporter import Exported
    from peftplan.planner import Plan


def _option(flag: str, metavar: str, help_text: str, completion: Callable[[str], list[str]] | None = None) -> Any:
    return typer.Option(
        flag, metavar=metavar, help=help_text, rich_help_panel=LIMITS, autocompletion=completion, show_default=False
    )


@takes_job
def command(
    job: Job,
    *,
    max_usd: Annotated[Text, _option("--max-usd", "USD", "Most that the run of --tokens may cost.")] = None,
    max_hours: Annotated[Text, _option("--max-hours", "HOURS", "Most that the run of --tokens may take.")] = None,
    min_seq_len: Annotated[
        Text, _option("--min-seq-len", "N", "Fewest tokens per sequence; the length where --seq-len is not given.")
    ] = None,
    methods: Annotated[
        Text,
        _option("--methods", "NAMES", "Methods allowed: lora,dora,full. Default lora,qlora,full.", complete.methods),
    ] = None,
    min_rank: Annotated[Text, _option("--min-rank", "N", "Lowest rank allowed.")] = None,
    min_quality: Annotated[
        Text, _option("--min-quality", "SHARE", "Lowest measured accuracy, 0 to 1; drops what nobody measured.")
    ] = None,
    global_batch: Annotated[
        Text, _option("--global-batch", "N", "Sequences per optimizer step, kept by every candidate. Default 8.")
    ] = None,
    objectives: Annotated[
        Text,
        _option(
            "--objectives",
            "NAMES",
            "What decides, in order, of cost, time, quality, headroom, simplicity.",
            complete.objectives,
        ),
    ] = None,
    aim: Annotated[
        Text,
        _option(
            "--aim",
            "NAME",
            "best (what the job gives is fixed) or smallest_change; the default with --config, else best.",
            complete.aims,
        ),
    ] = None,
    most: Annotated[Text, _option("--most", "N", "Rows of the ranking. Default 8.")] = None,
    write: Annotated[
        Path | None,
        typer.Option("--write", help="Folder to write that trains the best.", rich_help_panel=FILES, metavar="DIR"),
    ] = None,
    trainer: Trainer = "trl",
    launcher: Launcher = "local",
    dataset: Dataset = None,
    smoke: Smoke = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> str:
    """The best configurations for a budget; --gpu may be a list (rtx-4090,l40s), or left out for any common card."""
    from peftplan.planner import plan

    given = {
        "max_usd": max_usd,
        "max_hours": max_hours,
        "min_seq_len": min_seq_len,
        "methods": methods,
        "min_rank": min_rank,
        "min_quality": min_quality,
        "global_batch": global_batch,
        "objectives": objectives,
        "aim": aim,
        "most": most,
    }
    answer = plan(job, **{name: value for name, value in given.items() if value is not None})
    written = None
    if write is not None and answer.best is not None:
        from peftplan.exporter import export
        from peftplan.trainers import Run

        written = export(
            answer.best.job,
            trainer=trainer,
            launcher=launcher,
            out=write,
            run=Run(dataset=dataset),
            with_smoke=smoke,
            overwrite=overwrite,
        )
    return _reply(answer, written, json=json)


def _reply(answer: Plan, written: Exported | None, *, json: bool) -> str:
    if json:
        from peftplan.cli.output import as_json

        folder = {} if written is None else {"written": written.model_dump(mode="json", exclude={"job", "estimate"})}
        return as_json({**answer.model_dump(mode="json", by_alias=True), **folder})
    from rich.console import Group

    from peftplan.cli.output import as_text
    from peftplan.report import plan_screen
    from peftplan.report import written as folder_screen

    folders = [] if written is None else [folder_screen.render(written)]
    return as_text(Group(plan_screen.render(answer), *folders))
