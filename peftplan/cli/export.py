"""`peftplan export`: a job -> a folder that trains it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftplan.cli import complete
from peftplan.cli.options import FILES, TRAINING, Json, takes_job
from peftplan.job import Job

if TYPE_CHECKING:
    from peftplan.launchers import Place

Trainer = Annotated[
    str,
    typer.Option(
        "--trainer", help="What trains: see `peftplan list trainers`.", rich_help_panel=FILES, metavar="NAME",
        autocompletion=complete.trainers,
    ),
]  # fmt: skip
Launcher = Annotated[
    str,
    typer.Option(
        "--launcher", help="What starts its processes: see `peftplan list launchers`.", rich_help_panel=FILES,
        metavar="NAME", autocompletion=complete.launchers,
    ),
]  # fmt: skip
PlaceOf = Annotated[
    list[str] | None,
    typer.Option(
        "--place", help="What only you know of the cluster, repeatable: partition=gpu, hours=12, image=...",
        rich_help_panel=FILES, metavar="KEY=VALUE",
    ),
]  # fmt: skip
Out = Annotated[Path, typer.Option("--out", help="Folder to write.", rich_help_panel=FILES, metavar="DIR")]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset", help="JSON-lines file of messages, or a Hub dataset; else dataset.jsonl in the folder.",
        rich_help_panel=TRAINING, metavar="NAME",
    ),
]  # fmt: skip
MaxSteps = Annotated[
    int | None,
    typer.Option(
        "--max-steps", help="Optimizer steps; else one epoch.", min=1, rich_help_panel=TRAINING, metavar="N"
    ),
]  # fmt: skip
LearningRate = Annotated[
    float,
    typer.Option("--learning-rate", help="Learning rate.", min=0, rich_help_panel=TRAINING, metavar="RATE"),
]
Smoke = Annotated[
    bool,
    typer.Option("--smoke", help="Add a two-step dry run of a tiny model on the CPU.", rich_help_panel=FILES),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write into a folder that is not empty.", rich_help_panel=FILES)
]


@takes_job
def command(
    job: Job,
    *,
    out: Out,
    trainer: Trainer = "trl",
    launcher: Launcher = "local",
    place: PlaceOf = None,
    dataset: Dataset = None,
    max_steps: MaxSteps = None,
    learning_rate: LearningRate = 1e-4,
    smoke: Smoke = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> str:
    """Write a folder that trains a job: config, launch script, pinned requirements, README, estimate."""
    from peftplan.exporter import export
    from peftplan.trainers import Run

    run = Run(dataset=dataset, max_steps=max_steps, learning_rate=learning_rate)
    done = export(
        job,
        trainer=trainer,
        launcher=launcher,
        out=out,
        run=run,
        place=_place(place or []),
        with_smoke=smoke,
        overwrite=overwrite,
    )
    if json:
        from peftplan.cli.output import as_json

        return as_json(done)
    from peftplan.cli.output import as_text
    from peftplan.report import written

    return as_text(written.render(done))


def _place(pairs: list[str]) -> Place:
    from peftplan import plugins
    from peftplan.launchers import Place

    stated = dict(pair.partition("=")[::2] for pair in pairs)
    return plugins.configure(Place, stated, what="--place")
