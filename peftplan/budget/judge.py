"""One configuration against its limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from peftplan.budget.limits import Limits
from peftplan.budget.outcome import Held, Limit, Status, Unit
from peftplan.cost import SECONDS_PER_HOUR
from peftplan.job import Job
from peftplan.pipeline import estimate
from peftplan.result import Estimate


@dataclass(frozen=True)
class Answers:
    """Estimates by what they depend on: equal questions are answered once."""

    known: dict[str, Estimate] = field(default_factory=dict)

    def of(self, job: Job) -> Estimate:
        key = job.model_dump_json(exclude=_APART)
        if key not in self.known:
            self.known[key] = estimate(job)
        return self.known[key]


_APART = {"trainer", "extras", "remarks"}
"""Fields of a job that a file's reader keeps beside the question."""


def held(answer: Estimate, limits: Limits, base: Estimate | str | None) -> Iterator[Held]:
    """Every limit against the answer. `base` is the answer at the base revision, or why there is none; None where no
    base revision was asked for."""
    if answer.job.gpu is not None:
        yield _fit(answer, limits)
    if (most := limits.max_memory_bytes) is not None:
        yield _at_most("max_memory", most, answer.memory.device_bytes, "bytes", answer.reason("memory.device_bytes"))
    if limits.max_usd is not None:
        why = answer.reason("cost.usd_total", "cost", "time")
        yield _at_most("max_usd", limits.max_usd, answer.cost.usd_total, "usd", why)
    if limits.max_hours is not None:
        why = answer.reason("cost.usd_total", "time")
        yield _at_most("max_hours", limits.max_hours, hours(answer), "hours", why)
    if limits.growth is not None:
        yield _growth(answer, limits, base)


def hours(answer: Estimate) -> float | None:
    """Of the whole run, at the expected speed; None where its tokens or the speed are not known."""
    speed = answer.time.tokens_per_second
    return answer.job.tokens / speed / SECONDS_PER_HOUR if answer.job.tokens is not None and speed else None


def _fit(answer: Estimate, limits: Limits) -> Held:
    fit = answer.fit
    status: Status = "over"
    if fit.verdict is None:
        status = "error"
    elif fit.verdict == "fits" or fit.verdict == limits.accept:
        status = "within"
    why = answer.reason("fit", "memory.device_bytes") if fit.verdict is None else fit.verdict
    found = answer.memory.device_bytes
    return Held(limit="gpu", status=status, allowed=fit.usable_bytes, found=found, unit="bytes", why=why)


def _at_most(limit: Limit, most: float, found: float | None, unit: Unit, why: str) -> Held:
    if found is None:
        return Held(limit=limit, status="error", allowed=most, found=None, unit=unit, why=why)
    return Held(limit=limit, status="within" if found <= most else "over", allowed=most, found=found, unit=unit)


def _growth(answer: Estimate, limits: Limits, base: Estimate | str | None) -> Held:
    now = answer.memory.device_bytes
    if isinstance(base, str) or now is None:
        status: Status = "within" if isinstance(base, str) else "error"
        why = base if isinstance(base, str) else answer.reason("memory.device_bytes")
        return Held(limit="max_growth", status=status, allowed=None, found=None, unit="bytes", why=why)
    before = base.memory.device_bytes if base is not None else None
    if before is None or limits.growth is None:
        why = "there is no base to grow from; give --base REVISION"
        return Held(limit="max_growth", status="error", allowed=None, found=None, unit="bytes", why=why)
    return _at_most("max_growth", limits.growth.allowed_bytes(before), now - before, "bytes", "")
