"""The texts of a written folder: its launch script and its README."""

from __future__ import annotations

from collections.abc import Iterable

from peftplan.job import Job
from peftplan.result import Estimate
from peftplan.trainers import Trainer
from peftplan.units import format_bytes


def script(command: str) -> str:
    """run.sh: the one command, from inside the folder."""
    return f'#!/usr/bin/env bash\nset -euo pipefail\ncd "$(dirname "$0")"\n{command}\n'


def readme(
    trainer: Trainer,
    job: Job,
    files: Iterable[str],
    priced: Estimate | None,
    why_not: str | None,
    missing: tuple[str, ...],
) -> str:
    """README.md: how to start, what it should take, what to fill in first."""
    parts = [
        f"# {job.method} of {job.model} with {trainer.title}",
        _start(files),
        *([_fill_in(missing, trainer)] if missing else []),
        _prediction(priced, why_not),
        f"[{trainer.title}]({trainer.homepage}) reads the config; the versions in requirements.txt are those whose "
        "defaults the prediction assumes.",
    ]
    return "\n\n".join(parts) + "\n"


def _start(files: Iterable[str]) -> str:
    lines = ["```bash", "pip install -r requirements.txt && bash run.sh", "```"]
    if "smoke.sh" in files:
        lines += ["", "Two steps of a tiny random model of the same architecture, on the CPU, show that it runs:", ""]
        lines += ["```bash", "pip install -r requirements.txt && bash smoke.sh", "```"]
    return "\n".join(lines)


def _fill_in(missing: tuple[str, ...], trainer: Trainer) -> str:
    keys = ", ".join(f"`{key}`" for key in trainer.dataset_keys)
    rows = '`{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`'
    return (
        f"Put the rows to train on into `{missing[0]}` first, each line one {rows}, or name another dataset ({keys})."
    )


def _prediction(priced: Estimate | None, why_not: str | None) -> str:
    if priced is None:
        return f"Not priced: {why_not}."
    memory = priced.memory
    rows = [
        ("allocated at the peak", format_bytes(memory.peak_bytes)),
        ("on the card", _bytes(memory.device_bytes)),
        ("verdict", _verdict(priced)),
        ("trained parameters", f"{priced.parameters.trainable:,} of {priced.parameters.total:,}"),
        ("seconds per step", _seconds(priced)),
    ]
    head = "What peftplan predicts for one GPU (estimate.json has all of it):\n\n| | |\n|---|---|\n"
    return head + "\n".join(f"| {what} | {value} |" for what, value in rows)


def _bytes(size: int | None) -> str:
    return "unknown" if size is None else format_bytes(size)


def _verdict(priced: Estimate) -> str:
    fit = priced.fit
    return f"{fit.verdict} on {fit.gpu}" if fit.verdict else "no GPU named"


def _seconds(priced: Estimate) -> str:
    spread = priced.time.step_seconds
    return "unknown" if spread is None else f"{spread.expected:.2f} ({spread.low:.2f} to {spread.high:.2f})"
