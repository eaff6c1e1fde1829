"""From a job to a folder that trains it: config, launch script, pinned requirements, README, the estimate beside it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from peftplan import launchers, trainers
from peftplan.arch import catalog
from peftplan.errors import RequestError, Unsupported
from peftplan.exporter import pages, smoke
from peftplan.exporter.needs import requirements
from peftplan.job import Job, make_job
from peftplan.launchers import Place
from peftplan.pipeline import estimate
from peftplan.result import Estimate
from peftplan.trainers import Run

__all__ = ["Exported", "export"]

DATA = "dataset.jsonl"
"""Where a folder without a dataset of its own looks for rows: one `{"messages": [...]}` a line."""


class Exported(BaseModel):
    """What was written (schema `peftplan.export/1`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    schema_: Literal["peftplan.export/1"] = Field(default="peftplan.export/1", alias="schema")
    trainer: str
    launcher: str
    out: str
    files: tuple[str, ...]
    command: str
    """The one command that trains, run inside the folder after its requirements are installed."""
    fill_in: tuple[str, ...]
    """Files that the reader puts beside them, such as the rows to train on."""
    job: Job
    """The job as the written config states it, read back."""
    estimate: Estimate | None
    unpriced: str | None
    """Why there is no estimate."""


def export(
    job: Job | None = None,
    *,
    trainer: str = "trl",
    launcher: str = "local",
    out: str | Path,
    run: Run | None = None,
    place: Place | None = None,
    with_smoke: bool = False,
    overwrite: bool = False,
    **fields: Any,
) -> Exported:
    """Write a folder that trains `job` with `trainer`. `fields` are Job fields where no job is given.

    `launcher` says where its processes start, `place` what only the owner of a cluster knows. Without a dataset, `run`
    reads rows that are put beside the config. A catalog's short name is written as the model's Hub id.
    `with_smoke` adds `smoke.sh`: two optimizer steps of a tiny random model of the same architecture, on the CPU. The
    estimate beside the config is that of the config as its trainer will read it, trainer defaults included. Nothing is
    written where anything is wrong. Raises RequestError.
    """
    asked = _findable(job if job is not None else make_job(**fields))
    run = run or Run()
    missing = () if run.dataset else (DATA,)
    run = replace(run, dataset=run.dataset or DATA)
    target = _target(Path(out), overwrite=overwrite)
    folder = trainers.write_folder(asked, trainer=trainer, run=run)
    stated = trainers.get(trainer).stated(asked, run)
    needs = {"requirements.txt": requirements(trainers.get(trainer), stated)}
    folder = launchers.get(launcher).launch(replace(folder, files={**folder.files, **needs}), asked, place)
    priced, why = _priced(stated)
    files = {
        **folder.files,
        "run.sh": pages.script(folder.command),
    }
    if with_smoke:
        files |= smoke.files(asked, trainer=trainer)
    if priced is not None:
        files["estimate.json"] = priced.to_json() + "\n"
    files["README.md"] = pages.readme(trainers.get(trainer), stated, files, priced, why, missing)
    _write(target, files)
    return Exported(
        trainer=trainer,
        launcher=launcher,
        out=str(out),
        files=tuple(sorted(files)),
        command="bash run.sh",
        fill_in=missing,
        job=stated,
        estimate=priced,
        unpriced=why,
    )


def _findable(job: Job) -> Job:
    """`job` with a model that can be loaded from anywhere: a Hub id, or the whole path of a folder."""
    path = Path(job.model).expanduser()
    found = str(path.resolve()) if path.exists() else catalog.hub_id(job.model)
    return job.model_copy(update={"model": found})


def _target(out: Path, *, overwrite: bool) -> Path:
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out}: there is a file of that name; name a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise RequestError(f"--out {out}: the folder is not empty; name another, or give --overwrite")
    return out


def _priced(job: Job) -> tuple[Estimate | None, str | None]:
    try:
        return estimate(job), None
    except Unsupported as error:
        return None, str(error)


def _write(out: Path, files: Mapping[str, str]) -> None:
    """All files or none: they are written beside the folder first."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            for name, text in files.items():
                path = Path(scratch) / "new" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            shutil.copytree(Path(scratch) / "new", out, dirs_exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out {out}: {error.strerror or error}") from None
