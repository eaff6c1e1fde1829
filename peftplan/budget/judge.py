"""One configuration against its limits."""

from __future__ import annotations

from collections.abc import Iterator

from peftplan.budget.limits import Growth, Limits
from peftplan.budget.outcome import Held, Limit, Status, Unit
from peftplan.cost import SECONDS_PER_HOUR
from peftplan.result import Estimate


def held(answer: Estimate, limits: Limits, base: Estimate | str | None) -> Iterator[Held]:
    """Every limit against the answer. `base` is the answer at the base revision, or why there is none; None where no
    base revision was asked for."""
    if answer.job.gpu is not None:
        yield _fit(answer, limits)
    if limits.max_memory is not None:
        why = answer.reason("memory.device_bytes")
        yield _at_most("max_memory", limits, limits.max_memory_bytes, answer.memory.device_bytes, why)
    if limits.max_usd is not None:
        why = answer.reason("cost.usd_total", "cost", "time")
        yield _at_most("max_usd", limits, limits.max_usd, answer.cost.usd_total, why)
    if limits.max_hours is not None:
        why = answer.reason("time.tokens_per_second", "time", "cost.usd_total")
        yield _at_most("max_hours", limits, limits.max_hours, hours(answer), why)
    if limits.growth is not None:
        yield _growth(answer, limits, limits.growth, base)


def hours(answer: Estimate) -> float | None:
    """Of the whole run, at the expected speed; None where its tokens or the speed are not known."""
    speed = answer.time.tokens_per_second
    return answer.job.tokens / speed / SECONDS_PER_HOUR if answer.job.tokens is not None and speed else None


_UNITS: dict[Limit, Unit] = {
    "gpu": "bytes", "max_memory": "bytes", "max_usd": "usd", "max_hours": "hours", "max_growth": "bytes",
}  # fmt: skip


def _fit(answer: Estimate, limits: Limits) -> Held:
    fit = answer.fit
    within = fit.verdict in ("fits", limits.accept)
    return Held(
        limit="gpu",
        stated=fit.gpu or limits.gpu or "",
        status="error" if fit.verdict is None else "within" if within else "over",
        allowed=fit.usable_bytes,
        found=answer.memory.device_bytes,
        unit="bytes",
        why=answer.reason("fit", "memory.device_bytes") if fit.verdict is None else fit.verdict,
    )


def _at_most(limit: Limit, limits: Limits, most: float | None, found: float | None, why: str) -> Held:
    stated = getattr(limits, limit)
    stated = stated if isinstance(stated, str) else f"{stated:g}"
    status: Status = "error" if found is None or most is None else "within" if found <= most else "over"
    known = status != "error"
    return Held(
        limit=limit,
        stated=stated,
        status=status,
        allowed=most,
        found=found,
        unit=_UNITS[limit],
        why="" if known else why,
    )


def _growth(answer: Estimate, limits: Limits, growth: Growth, base: Estimate | str | None) -> Held:
    now = answer.memory.device_bytes
    before = base.memory.device_bytes if isinstance(base, Estimate) else None
    if before is not None and now is not None:
        return _at_most("max_growth", limits, growth.allowed_bytes(before), now - before, "")
    why = base if isinstance(base, str) else "there is no base to grow from; give --base REVISION"
    unjudged = _at_most("max_growth", limits, None, None, answer.reason("memory.device_bytes") or why)
    return unjudged.model_copy(update={"status": "within"}) if isinstance(base, str) else unjudged


def taken(answer: Estimate, unit: Unit) -> float | int | None:
    """What a broken limit counts, as far as it costs no replay of the allocator."""
    if unit == "usd":
        return answer.cost.usd_total
    if unit == "bytes":
        return answer.memory.peak_bytes
    return 1 / answer.time.tokens_per_second if answer.time.tokens_per_second else None
