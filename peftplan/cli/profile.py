"""`peftplan profile`: the real transformers and PEFT model, traced without weights or run on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from peftplan.cli import complete
from peftplan.cli.options import FILES, MACHINE, Json, takes_job
from peftplan.errors import OutsideError, RequestError, UnknownName
from peftplan.job import Job

MODES: dict[str, Literal["fake", "real"]] = {"meta": "fake", "cpu": "real"}
EXTRA = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


@takes_job
def command(
    job: Job,
    *,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="NAME",
            help="meta (no weights, no GPU needed) or cpu (random weights, real tensors).",
            rich_help_panel=MACHINE,
            autocompletion=complete.devices,
        ),
    ] = "meta",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Also write the whole trace to this file.", rich_help_panel=FILES),
    ] = None,
    json: Json = False,
) -> str:
    """Trace one step of the real model and hold the estimate against it."""
    mode = _mode(device)
    from peftplan.pipeline import estimate

    predicted = estimate(job.model_copy(update={"backend": "cpu"}))
    traced = {"schema": "peftplan.trace/1", **_trace(predicted.job, mode)}
    from peftplan.cli.output import as_json, as_text

    if out is not None:
        _write(out, as_json(traced))
    if json:
        return as_json(traced)
    from peftplan.report import side_by_side

    return as_text(side_by_side.render(predicted, traced))


def _mode(device: str) -> Literal["fake", "real"]:
    if device == "cuda":
        raise OutsideError("--device cuda: this version cannot measure on a GPU; use --device meta")
    if device not in MODES:
        raise UnknownName("--device", device, (*MODES, "cuda"))
    return MODES[device]


def _trace(job: Job, mode: Literal["fake", "real"]) -> dict[str, Any]:
    try:
        from peftplan.instruments.trace import trace
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        raise OutsideError(f'a trace needs {error.name}; pip install "peftplan[trace]"') from None
    return trace(job, mode=mode).model_dump()


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--out {path}: {error.strerror or error}") from None
