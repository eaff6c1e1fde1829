"""Runs a campaign: each job in a process of its own, each record written as soon as it is there.

What is recorded already is left out, so a call that was cut off goes on where it was. Running out of memory is a
result. On a GPU the next process loads its libraries while the one before it measures.

`python -m peftplan.instruments.campaign_run FILE --out DIR [--device cuda|cpu] [--budget 9m]` is `peftplan profile
--campaign FILE` for a machine without typer and rich. The parent process needs no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from peftplan.errors import OutsideError, PeftplanError, RequestError
from peftplan.instruments import gpu, request
from peftplan.instruments.campaign import Campaign, Planned, parse_seconds, read
from peftplan.pipeline import estimate
from peftplan.records import Record, add, load, parse

MOST_SECONDS = 300.0
"""One run takes no longer; one that does is given up."""
Status = Literal["measured", "out of memory", "recorded already", "failed", "not reached"]
QUIET = {**os.environ, "KINETO_LOG_LEVEL": "5"}
WORKER = ("-m", "peftplan.instruments.cuda", "--worker")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one run."""

    name: str
    status: Status
    record: Record | None = None
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What became of a campaign."""

    campaign: str
    path: str
    """The file of its records."""
    outcomes: tuple[Outcome, ...]
    seconds: float
    problems: tuple[str, ...] = ()
    """What was wrong with records that were there."""

    def count(self, status: Status) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def exit_code(self) -> int:
        """3 where a run failed of something else than memory."""
        return OutsideError.exit_code if self.count("failed") else 0

    def model_dump(self) -> dict[str, Any]:
        """Plain dicts and lists (schema `peftplan.campaign-run/1`)."""
        runs = [
            {
                "name": outcome.name,
                "status": outcome.status,
                "seconds": round(outcome.seconds, 3),
                "error": outcome.error,
                "record": None if outcome.record is None else outcome.record.id,
            }
            for outcome in self.outcomes
        ]
        head = {"schema": "peftplan.campaign-run/1", "campaign": self.campaign, "path": self.path}
        return {**head, "seconds": round(self.seconds, 3), "problems": list(self.problems), "runs": runs}


class Watcher(Protocol):
    """Whoever shows how far it is."""

    def begins(self, name: str, number: int, total: int) -> None:
        """Run `number` of `total`, from 1."""

    def ends(self, outcome: Outcome) -> None:
        """It is over."""


class Lines:
    """One line a run on standard error."""

    _at = ""

    def begins(self, name: str, number: int, total: int) -> None:  # noqa: ARG002 - the outcome says it
        self._at = f"{number}/{total}"

    def ends(self, outcome: Outcome) -> None:
        more = f": {outcome.error}" if outcome.error else ""
        print(
            f"{self._at} {outcome.name}: {outcome.status}{more} ({outcome.seconds:.1f} s)", file=sys.stderr, flush=True
        )


def run(
    campaign: Campaign,
    folder: Path,
    *,
    device: str,
    budget_seconds: float | None = None,
    watcher: Watcher | None = None,
) -> Report:
    """Measures what of `campaign` has no record in `folder` yet, within the budget.

    Raises RequestError for a run that cannot be estimated, OutsideError where there is no such device.
    """
    card = gpu.read() if device == "cuda" else None
    where = _Where.of(campaign, folder, device, card)
    for planned in campaign.runs:
        _check(planned)
    with _Crew(standby=device == "cuda") as crew:
        return _Round(campaign, where, crew, watcher or Lines()).run(budget_seconds or campaign.budget_seconds)


def _check(planned: Planned) -> None:
    """It is a job that can be estimated; said before any is measured."""
    try:
        estimate(planned.job)
    except RequestError as error:
        raise RequestError(f"run {planned.name}: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Where:
    """The campaign on one kind of machine: its name there, and its file."""

    name: str
    path: Path

    @staticmethod
    def of(campaign: Campaign, folder: Path, device: str, card: gpu.Card | None) -> _Where:
        machine = "cpu" if device == "cpu" else _short(card)
        name = f"{campaign.name}-{machine}"
        return _Where(name=name, path=folder / f"{name}.jsonl")

    def identity(self, planned: Planned) -> str:
        return f"{self.name}-{planned.name}"


def _short(card: gpu.Card | None) -> str:
    """`h100-80gb-hbm3` for NVIDIA H100 80GB HBM3."""
    return "gpu" if card is None else "-".join(card.name.lower().removeprefix("nvidia ").split())


@dataclass(slots=True)
class _Round:
    """One call of `run`."""

    campaign: Campaign
    where: _Where
    crew: _Crew
    watcher: Watcher
    outcomes: list[Outcome] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    longest: float = 0.0

    def run(self, budget_seconds: float | None) -> Report:
        start = time.monotonic()
        recorded = self._recorded()
        total = len(self.campaign.runs)
        for number, planned in enumerate(self.campaign.runs, start=1):
            left = None if budget_seconds is None else budget_seconds - (time.monotonic() - start)
            self.watcher.begins(planned.name, number, total)
            outcome = self._known(planned, recorded) or self._measured(planned, left)
            self.outcomes.append(outcome)
            self.watcher.ends(outcome)
        return Report(
            campaign=self.where.name,
            path=str(self.where.path),
            outcomes=tuple(self.outcomes),
            seconds=time.monotonic() - start,
            problems=tuple(dict.fromkeys(self.problems)),
        )

    def _recorded(self) -> dict[str, Record]:
        folder = self.where.path.parent
        if not folder.is_dir():
            return {}
        loaded = load(folder)
        self.problems += loaded.problems
        return {record.id: record for record in loaded}

    def _known(self, planned: Planned, recorded: dict[str, Record]) -> Outcome | None:
        record = recorded.get(self.where.identity(planned))
        if record is None or record.run is None:
            return None
        if record.run.asked != request.fingerprint(planned.job, planned.settings):
            return None
        return Outcome(name=planned.name, status="recorded already", record=record)

    def _measured(self, planned: Planned, left: float | None) -> Outcome:
        if left is not None and left <= self.longest:
            return Outcome(name=planned.name, status="not reached", error="the time is up")
        asked = request.line(
            planned.job, planned.settings, identity=self.where.identity(planned), campaign=self.where.name
        )
        start = time.monotonic()
        reply = self.crew.ask(asked, MOST_SECONDS if left is None else min(left, MOST_SECONDS))
        seconds = time.monotonic() - start
        self.longest = max(self.longest, seconds)
        return self._judged(planned, reply, seconds, cut=left is not None and left < MOST_SECONDS)

    def _judged(self, planned: Planned, reply: dict[str, Any], seconds: float, *, cut: bool) -> Outcome:
        if reply.get("no_device"):
            raise OutsideError(reply["error"])
        if reply.get("late"):
            why = "the time is up" if cut else f"took more than {MOST_SECONDS:.0f} s"
            return Outcome(name=planned.name, status="not reached" if cut else "failed", seconds=seconds, error=why)
        if "record" not in reply:
            return Outcome(name=planned.name, status="failed", seconds=seconds, error=str(reply["error"]))
        record = parse(json.dumps(reply["record"]))
        self.problems += add(self.where.path, record)
        status: Status = "out of memory" if record.out_of_memory else "measured"
        return Outcome(name=planned.name, status=status, record=record, seconds=seconds)


class _Crew:
    """Worker processes: one at work, and, with `standby`, one that loads its libraries meanwhile."""

    def __init__(self, *, standby: bool) -> None:
        self._standby = standby
        self._next: _Worker | None = None
        self._busy: _Worker | None = None

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (self._busy, self._next):
            if worker is not None:
                worker.end()

    def ask(self, line: str, seconds: float) -> dict[str, Any]:
        """A fresh process's answer."""
        self._busy = self._next or _Worker()
        self._next = _Worker() if self._standby else None
        try:
            return self._busy.ask(line, seconds)
        finally:
            self._busy.end()
            self._busy = None


class _Worker:
    """One process that answers one request."""

    def __init__(self) -> None:
        self._said: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, *WORKER], stdin=pipe, stdout=pipe, stderr=self._said, text=True, env=QUIET
        )

    def ask(self, line: str, seconds: float) -> dict[str, Any]:
        """Its answer; `late` where it takes longer, `error` where it dies without one."""
        try:
            out, _ = self._process.communicate(line, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"late": True}
        if out.strip():
            answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
            return answer
        return {"error": f"the process ended with {self._process.returncode} and no answer: {self._last_line()}"}

    def _last_line(self) -> str:
        self._said.seek(0)
        return next((line.strip() for line in reversed(self._said.readlines()) if line.strip()), "it said nothing")

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._said.close()


def main(arguments: Iterable[str]) -> int:
    """Returns the exit code: 0, 2 for a wrong request, 3 where there is no GPU or a run failed."""
    parser = argparse.ArgumentParser(prog="python -m peftplan.instruments.campaign_run", description="Run a campaign.")
    parser.add_argument("file", type=Path, help="the campaign")
    parser.add_argument("--out", type=Path, required=True, help="folder for its records")
    parser.add_argument("--device", choices=request.DEVICES, default="cuda")
    parser.add_argument("--budget", help="time for this call, such as 9m; else the file's")
    asked = parser.parse_args(list(arguments))
    try:
        budget = parse_seconds(asked.budget) if asked.budget else None
        report = run(read(asked.file, device=asked.device), asked.out, device=asked.device, budget_seconds=budget)
    except PeftplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(report.model_dump(), indent=1))
    return report.exit_code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
