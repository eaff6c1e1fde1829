"""Estimates of many jobs: equal questions are answered once, and several processes can share the work."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

from peftplan.errors import PeftplanError
from peftplan.job import Job
from peftplan.pipeline import estimate
from peftplan.result import Estimate

APART = {"trainer", "extras", "remarks"}
"""Fields of a job that a file's reader keeps beside the question."""
WORTH_A_PROCESS = 8
"""Fewer jobs than this are answered sooner than processes start (fork 10 to 20 ms, a verdict 40 ms; 2026-11)."""


@dataclass(frozen=True)
class Answers:
    """Estimates by what they depend on."""

    known: dict[str, Estimate] = field(default_factory=dict)

    def of(self, job: Job) -> Estimate:
        """The estimate of `job`. Raises PeftplanError."""
        key = _key(job)
        if key not in self.known:
            self.known[key] = estimate(job)
        return self.known[key]

    def prepare(self, jobs: Iterable[Job], *, workers: int) -> None:
        """Answers `jobs` ahead, verdicts included, in up to `workers` processes. What cannot be answered is left to
        `of`. Only Linux forks safely and cheaply; elsewhere nothing is done ahead."""
        wanted = {_key(job): job for job in jobs}
        todo = [job for key, job in wanted.items() if key not in self.known]
        count = min(workers, len(todo) // WORTH_A_PROCESS)
        if count < 2 or sys.platform != "linux":
            return
        from multiprocessing import get_context

        with get_context("fork").Pool(count, _leave_interrupts) as pool:
            found = pool.map(_answered, todo, chunksize=4)
        self.known.update((_key(job), answer) for job, answer in zip(todo, found, strict=True) if answer is not None)


def _key(job: Job) -> str:
    return job.model_dump_json(exclude=APART)


def _leave_interrupts() -> None:
    """Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _answered(job: Job) -> Estimate | None:
    """The estimate with its verdict, or None where there is none; pickling it computes what is late."""
    try:
        return estimate(job)
    except PeftplanError:
        return None
