"""Jobs side by side: which choices differ, and what that does to memory, FLOPs, time and cost.

Every job is answered anew and shown resolved, so a default that one of them states and the other leaves out is no
difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from peftplan.errors import RequestError
from peftplan.job import Job
from peftplan.pipeline import VERSION, estimate
from peftplan.questions import read_job
from peftplan.result import Estimate
from peftplan.revisions import texts_at

Value = str | int | float | bool | None
Unit = Literal["bytes", "flops", "seconds", "usd", "kwh", "count", "share", "tokens per second", ""]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)


class Choice(_Frozen):
    """A field of the question that differs; one value per job. A setting is `set.method.lora_alpha`."""

    field: str
    values: tuple[Any, ...]


class Quantity(_Frozen):
    """A number of the answer, one value per job; None where the estimate leaves it open."""

    name: str
    unit: Unit
    values: tuple[Value, ...]
    deltas: tuple[float | int | None, ...]
    """Each value less the first one; None where either is unknown or no number."""


class Comparison(_Frozen):
    """Two or more jobs and their answers (schema `peftplan.compare/1`)."""

    schema_: Literal["peftplan.compare/1"] = Field(default="peftplan.compare/1", alias="schema")
    version: str
    names: tuple[str, ...]
    jobs: tuple[Job, ...]
    question: tuple[Choice, ...]
    answer: tuple[Quantity, ...]


def compare(*jobs: Job | Estimate | Path | str, base: str | None = None) -> Comparison:
    """Two or more jobs side by side, the first being what the others are held against.

    A job is a Job, an Estimate (whose job is taken), or a file: a job, an estimate's JSON or a trainer's config. With
    `base`, a git revision, each file stands beside itself at that revision. Raises RequestError.
    """
    return of_jobs(named(jobs, base=base))


def named(jobs: Sequence[Job | Estimate | Path | str], *, base: str | None) -> list[tuple[str, Job]]:
    """Each job by its name; with `base`, each file twice: at that revision and as it is. Raises RequestError."""
    if base is None:
        return [_named(job) for job in jobs]
    paths = [Path(job) for job in jobs if not isinstance(job, (Job, Estimate))]
    if not paths or len(paths) < len(jobs):
        raise RequestError(f"base {base!r} needs files; a job without one has no revisions")
    now = [_named(path) for path in paths]
    texts = texts_at(base, paths)
    before = [(f"{path} at {base}", _at(path, texts[path], base)) for path in paths]
    return [job for pair in zip(before, now, strict=True) for job in pair]


def of_jobs(jobs: Iterable[tuple[str, Job]]) -> Comparison:
    """The comparison of jobs by their names. Raises RequestError."""
    pairs = list(jobs)
    if len(pairs) < 2:
        raise RequestError(
            "one job alone cannot be compared; give another, a base revision of its file, or options that differ"
        )
    answers = [estimate(job) for _, job in pairs]
    return Comparison(
        version=VERSION,
        names=tuple(name for name, _ in pairs),
        jobs=tuple(answer.job for answer in answers),
        question=tuple(_question([_flat(answer.job) for answer in answers])),
        answer=tuple(_answer(answers)),
    )


def _named(job: Job | Estimate | Path | str) -> tuple[str, Job]:
    if isinstance(job, Estimate):
        return job.job.model, job.job
    if isinstance(job, Job):
        return job.model, job
    return str(job), read_job(Path(job))


def _at(path: Path, text: str | None, base: str) -> Job:
    if text is None:
        raise RequestError(f"{path}: there is no such file at {base}")
    return read_job(Path(f"{base}:{path}"), text=text)


# -- the question -----------------------------------------------------------------------------------------------


def _flat(job: Job) -> dict[str, Any]:
    """The fields of a resolved job, its settings one by one, and its model's config where the name does not say it."""
    stated = job.model_dump(mode="json", by_alias=True, exclude={"remarks", "extras", "trainer"})
    for nested in ("set", "config"):
        inner = stated.pop(nested) or {}
        stated.update({f"{nested}.{key}": value for key, value in inner.items()})
    return stated


def _question(jobs: list[dict[str, Any]]) -> Iterable[Choice]:
    keys = dict.fromkeys(key for job in jobs for key in job)
    other_models = len({job["model"] for job in jobs}) > 1
    for key in keys:
        values = tuple(job.get(key) for job in jobs)
        told_by_the_model = other_models and key.startswith("config.")
        if not told_by_the_model and any(value != values[0] for value in values[1:]):
            yield Choice(field=key, values=values)


# -- the answer -------------------------------------------------------------------------------------------------

_QUANTITIES: tuple[tuple[str, Unit], ...] = (
    ("parameters.total", "count"),
    ("parameters.trainable", "count"),
    ("parameters.stored_bytes", "bytes"),
    ("memory.device_bytes", "bytes"),
    ("memory.reserved_bytes", "bytes"),
    ("memory.peak_bytes", "bytes"),
    ("memory.static_bytes", "bytes"),
    ("memory.saved_for_backward_bytes", "bytes"),
    ("memory.kv_cache_bytes", "bytes"),
    ("fit.verdict", ""),
    ("fit.headroom_bytes", "bytes"),
    ("flops.forward", "flops"),
    ("flops.backward", "flops"),
    ("flops.recompute", "flops"),
    ("flops.optimizer", "flops"),
    ("flops.total", "flops"),
    ("time.step_seconds.expected", "seconds"),
    ("time.tokens_per_second", "tokens per second"),
    ("time.mfu", "share"),
    ("cost.usd_per_hour", "usd"),
    ("cost.usd_per_million_tokens", "usd"),
    ("cost.usd_total", "usd"),
    ("cost.energy_kwh", "kwh"),
)


def _answer(answers: list[Estimate]) -> Iterable[Quantity]:
    dumps = [answer.model_dump(exclude={"job", "assumptions"}) for answer in answers]
    kinds = dict.fromkeys(kind for answer in answers for kind in answer.memory.at_peak)
    at_peak: list[tuple[str, Unit]] = [(f"memory.at_peak.{kind}", "bytes") for kind in kinds]
    for name, unit in (*_QUANTITIES, *at_peak):
        absent = 0 if name.startswith("memory.at_peak.") else None
        values = tuple(_look_up(dump, name.split("."), absent) for dump in dumps)
        if any(value is not None for value in values):
            yield Quantity(name=name, unit=unit, values=values, deltas=tuple(_less(v, values[0]) for v in values))


def _look_up(data: Any, keys: list[str], absent: Value) -> Any:
    for key in keys:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key, absent)
    return data


def _less(value: Value, first: Value) -> float | int | None:
    if isinstance(value, (int, float)) and isinstance(first, (int, float)):
        return value - first
    return None
