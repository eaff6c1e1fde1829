"""`peftplan profile`: the real transformers and PEFT model, traced without weights or run on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftplan.cli import complete
from peftplan.cli.options import FILES, MACHINE, JobOptions, Json, takes_options
from peftplan.cli.output import Reply
from peftplan.errors import OutsideError, RequestError, UnknownName
from peftplan.job import Job

if TYPE_CHECKING:
    from peftplan.records import Record

DEVICES = ("meta", "cuda", "cpu")
EXTRA = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


@takes_options
def command(
    options: JobOptions,
    *,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            help="meta (a trace: no weights, no GPU needed), or a run with random weights on cuda or cpu. "
            "Default meta; of a campaign cuda.",
            rich_help_panel=MACHINE,
            autocompletion=complete.devices,
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option("--limit", metavar="SIZE", help="Of a run: take no more of the device.", rich_help_panel=MACHINE),
    ] = None,
    campaign: Annotated[
        Path | None,
        typer.Option(
            "--campaign", metavar="FILE", help="Run every job of a campaign file instead.", rich_help_panel=FILES
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", metavar="TIME", help="Of a campaign: begin nothing that ends later, 9m.", rich_help_panel=FILES
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="PATH",
            help="Write the trace to this file; put a run's record into this file of records, a campaign's into this "
            "folder.",
            rich_help_panel=FILES,
        ),
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(
            "--history", metavar="FILE", help="Of a run on cuda: the allocator's history.", rich_help_panel=FILES
        ),
    ] = None,
    json: Json = False,
) -> str | Reply:
    """Trace one step of the real model, or run it, and hold the estimate against it."""
    if device not in (None, *DEVICES):
        raise UnknownName("--device", str(device), DEVICES)
    run_only = {"--limit": limit, "--history": history, "--budget": budget}
    if campaign is not None:
        _none_of({"--limit": limit, "--history": history}, "a campaign's file says for each run")
        return _campaign(options, campaign, device or "cuda", (out, budget), json=json)
    _none_of({"--budget": budget}, "only a --campaign has one")
    if device in ("cuda", "cpu"):
        return _run(options.job(), device, (limit, history), out, json=json)
    _none_of(run_only, "a trace has none; name --device cuda or cpu")
    return _traced(options.job(), out, json=json)


def _none_of(options: dict[str, Any], why: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise RequestError(f"{name}: {why}")


# -- a trace ----------------------------------------------------------------------------------------------------------


def _traced(job: Job, out: Path | None, *, json: bool) -> str:
    from peftplan.pipeline import estimate

    predicted = estimate(job.model_copy(update={"backend": "cpu"}))
    traced = {"schema": "peftplan.trace/1", **_trace(predicted.job)}
    from peftplan.cli.output import as_json, as_text

    if out is not None:
        _write(out, as_json(traced))
    if json:
        return as_json(traced)
    from peftplan.report import side_by_side

    return as_text(side_by_side.render(predicted, traced))


def _trace(job: Job) -> dict[str, Any]:
    try:
        from peftplan.instruments.trace import trace
    except ModuleNotFoundError as error:
        raise _missing(error, "a trace") from None
    return trace(job, mode="fake").model_dump()


def _missing(error: ModuleNotFoundError, what: str) -> Exception:
    if (error.name or "").partition(".")[0] not in EXTRA:
        return error
    return OutsideError(f'{what} needs {error.name}; pip install "peftplan[trace]"')


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--out {path}: {error.strerror or error}") from None


# -- a run ------------------------------------------------------------------------------------------------------------


def _run(job: Job, device: str, choices: tuple[str | None, Path | None], out: Path | None, *, json: bool) -> str:
    limit, history = choices
    record = _measure(job, device, limit, history)
    problems: tuple[str, ...] = ()
    if out is not None:
        from peftplan.records import add

        problems = add(out, record)
    from peftplan.cli.output import as_json, as_text

    if json:
        return as_json(record.model_dump(mode="json", by_alias=True, exclude_none=True))
    from peftplan.pipeline import estimate
    from peftplan.report import measured

    return as_text(measured.render(record, estimate(record.to_job()), problems))


def _measure(job: Job, device: str, limit: str | None, history: Path | None) -> Record:
    from peftplan.instruments import request

    settings = request.Settings(
        device=device, limit_bytes=request.limit(limit), history=None if history is None else str(history)
    )
    try:
        from peftplan.instruments.run import measure
    except ModuleNotFoundError as error:
        raise _missing(error, "a run") from None
    return measure(job, settings, identity=request.identity_of(job, device), campaign=request.SINGLE)


# -- a campaign -------------------------------------------------------------------------------------------------------


def _campaign(
    options: JobOptions, path: Path, device: str, rest: tuple[Path | None, str | None], *, json: bool
) -> Reply:
    from peftplan.cli.output import as_json, as_text
    from peftplan.instruments import campaign_run
    from peftplan.instruments.campaign import parse_seconds, read
    from peftplan.report import measured
    from peftplan.report.progress import Bar

    out, budget = rest
    if options.said or options.job_file or options.config_file:
        raise RequestError("--campaign states its own jobs; leave the options of a job out")
    if device == "meta":
        raise RequestError("--device meta: a campaign is run; name cuda or cpu")
    if out is None:
        raise RequestError("--campaign needs --out FOLDER for its records")
    seconds = parse_seconds(budget) if budget is not None else None
    with Bar() as bar:
        report = campaign_run.run(read(path, device=device), out, device=device, budget_seconds=seconds, watcher=bar)
    text = as_json(report.model_dump()) if json else as_text(measured.summary(report))
    return Reply(text=text, exit_code=report.exit_code, complaint=_complaint(report.count("failed")))


def _complaint(failed: int) -> str:
    return f"{failed} runs failed; the list names why" if failed else ""
