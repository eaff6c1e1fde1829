"""Estimates of the candidates that a plan looks at closely, each made once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from peftplan.cost import run_hours
from peftplan.job import Job
from peftplan.pipeline import estimate
from peftplan.planner import rank, says
from peftplan.planner.desk import Candidate
from peftplan.planner.goal import Objective
from peftplan.planner.result import Change, Entry
from peftplan.resolve import resolve
from peftplan.result import Estimate

COMPARED = (
    "method", "rank", "target_modules", "format", "seq_len", "micro_batch", "grad_accum", "optimizer", "recompute",
    "attention", "kernels", "offload", "gpus", "nodes", "layout",
)  # fmt: skip
"""Fields whose change an entry tells."""


class Bench:
    """Verdicts and entries of candidates, whatever space they come from."""

    def __init__(self, job: Job) -> None:
        alone = {"gpu": None, "gpus": 1, "nodes": 1, "layout": None}
        self._asked = job
        self._start = resolve(job.model_copy(update=alone)).job
        self._estimates: dict[Candidate, Estimate] = {}

    def estimate(self, c: Candidate) -> Estimate:
        """What `estimate` says of a candidate."""
        if c not in self._estimates:
            self._estimates[c] = estimate(c.job)
        return self._estimates[c]

    def fits(self, c: Candidate) -> bool:
        """Whether its verdict is `fits`; replays the allocator where that could be."""
        return c.may_fit and self.estimate(c).fit.verdict == "fits"

    def device_bytes(self, c: Candidate) -> int | None:
        return self.estimate(c).memory.device_bytes

    def entry(self, c: Candidate) -> Entry:
        """A candidate in the words of the plan."""
        found = self.estimate(c)
        job, speed = found.job, found.time.tokens_per_second
        return Entry(
            job=job,
            gpu=c.seat.gpu.name,
            gpus=c.seat.cards,
            verdict=found.fit.verdict,
            peak_bytes=found.memory.peak_bytes,
            device_bytes=found.memory.device_bytes,
            headroom_bytes=found.fit.headroom_bytes,
            tokens_per_second=speed,
            hours=run_hours(job.tokens, speed) if job.tokens is not None and speed else None,
            usd_per_hour=found.cost.usd_per_hour,
            usd_per_million_tokens=found.cost.usd_per_million_tokens,
            usd_total=found.cost.usd_total,
            trainable=found.parameters.trainable,
            quality=c.quality.accuracy,
            quality_why=c.quality.why,
            effort=c.effort,
            changes=tuple(self._changes(job)),
        )

    def compared(self, c: Candidate, winner: Candidate, order: Sequence[Objective]) -> Entry:
        """A candidate with the reason why the winner is before it."""
        mine = self.entry(c)
        if c is winner:
            return mine
        why = says.lost(mine, self.entry(winner), rank.decided_by(c, winner, order))
        return mine.model_copy(update={"lost": why})

    def _changes(self, job: Job) -> Iterator[Change]:
        for name in COMPARED:
            before, after = getattr(self._start, name), getattr(job, name)
            if before != after:
                yield Change(field=name, before=before, after=after)
        for key, value in job.settings.items():
            if value != (before := self._asked.settings.get(key)):
                yield Change(field=key, before=before, after=value)


def changed_fields(c: Candidate) -> frozenset[str]:
    """Fields of the asked job that a candidate sets to something else."""
    asked: Any = c.space.job
    update = {**c.shape.update, **c.optimizer.update}
    return frozenset(
        name for name, value in update.items() if value is not None and value != getattr(asked, name, None)
    )
