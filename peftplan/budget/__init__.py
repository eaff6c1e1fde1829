"""Budgets for configurations: `check` says which ones break theirs, and on which line. For pull requests and CI."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peftplan.budget import files, judge, levers, sources
from peftplan.budget.answers import Answers
from peftplan.budget.levers import Place
from peftplan.budget.limits import Limits
from peftplan.budget.outcome import Check, Held, Judged, Lever, Unit, worst
from peftplan.budget.sources import Source
from peftplan.errors import PeftplanError, RequestError
from peftplan.job import Job
from peftplan.pipeline import VERSION
from peftplan.result import Estimate
from peftplan.revisions import texts_at

__all__ = ["Check", "Held", "Judged", "Lever", "Limits", "check"]


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A configuration under a budget."""

    budget: str
    limits: Limits
    source: Source


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A case read: its job, and the job at the base revision, or why there is none."""

    case: _Case
    text: str
    job: Job | PeftplanError
    before: str | None = None
    base: Job | str | None = None

    def jobs(self) -> list[Job]:
        return [job for job in (self.job, self.base) if isinstance(job, Job)]


def check(
    *configs: Job | Path | str,
    limits: Limits | None = None,
    budgets: Path | str | None = None,
    base: str | None = None,
    workers: int = 1,
) -> Check:
    """Which configurations keep within their budgets.

    With `limits`, every one of `configs` (a Job, a job file or a trainer's config file) is held against them. Without,
    budgets are those of the file `budgets`, or of the nearest peftplan.toml or pyproject.toml; `configs` then picks
    those to judge. `base` is a git revision for `max_growth` and for naming what changed. On Linux many configurations
    are shared out over `workers` forked processes; the answers are the same.

    A configuration that cannot be read or judged is a result of its own; the others are judged. Raises RequestError
    where the request itself or the budget file is wrong.
    """
    cases = _cases(configs, limits, Path(budgets) if budgets is not None else None)
    texts = _base_texts(cases, base)
    asked = [_asked(case, texts, base) for case in cases]
    answers = Answers()
    answers.prepare((job for one in asked for job in one.jobs()), workers=workers)
    results = tuple(_result(one, answers) for one in asked)
    return Check(version=VERSION, base=base, status=worst([r.status for r in results]), results=results)


def _cases(configs: Iterable[Job | Path | str], limits: Limits | None, budgets: Path | None) -> list[_Case]:
    given = [sources.of_job(c) if isinstance(c, Job) else sources.of_file(Path(c)) for c in configs]
    if limits is not None and not given:
        raise RequestError("limits need a configuration to judge; name its file, or put both into peftplan.toml")
    if limits is not None and budgets is not None:
        raise RequestError(f"{budgets}: give limits or a budget file, not both")
    if limits is not None:
        return [_Case(budget="as given", limits=limits, source=source) for source in given]
    path = budgets or files.find(Path.cwd())
    if path is None and given:
        return [_Case(budget="as given", limits=Limits(), source=source) for source in given]
    if path is None:
        raise RequestError("no budgets: no peftplan.toml and no [tool.peftplan] in a pyproject.toml here or above; "
                           "write one, or give files and limits")  # fmt: skip
    return _picked([_Case(budget=b.name, limits=b.limits, source=s) for b, s in _members(path)], given, path)


def _members(path: Path) -> Iterator[tuple[files.Budget, Source]]:
    return files.members(path, files.read(path))


def _picked(cases: list[_Case], wanted: list[Source], path: Path) -> list[_Case]:
    """The cases of the wanted files; all where none is named."""
    if not wanted:
        return cases
    known = {case.source.path.resolve() for case in cases if case.source.path is not None}
    for source in wanted:
        if source.path is None or source.path.resolve() not in known:
            raise RequestError(f"{source.name}: no budget of {sources.shown(path)} covers it; give limits, or add it")
    chosen = {source.path.resolve() for source in wanted if source.path is not None}
    return [case for case in cases if case.source.path is not None and case.source.path.resolve() in chosen]


def _base_texts(cases: list[_Case], base: str | None) -> dict[Path, str | None]:
    if base is None:
        return {}
    paths = [case.source.path for case in cases if case.source.path is not None and case.source.path.exists()]
    return texts_at(base, list(dict.fromkeys(paths)))


def _asked(case: _Case, texts: dict[Path, str | None], base: str | None) -> _Asked:
    try:
        text = case.source.text()
        job = case.limits.asked(case.source.read(text))
    except PeftplanError as error:
        return _Asked(case=case, text="", job=error)
    if base is None or case.source.path is None:
        return _Asked(case=case, text=text, job=job)
    before = texts.get(case.source.path)
    return _Asked(case=case, text=text, job=job, before=before, base=_job_before(case, before, base))


def _job_before(case: _Case, text: str | None, base: str) -> Job | str:
    if text is None:
        return f"new since {base}"
    try:
        return case.limits.asked(case.source.read(text))
    except PeftplanError as error:
        return f"not read at {base}: {error}"


def _result(asked: _Asked, answers: Answers) -> Judged:
    try:
        return _judged(asked, answers)
    except PeftplanError as error:
        name, message = asked.case.source.name, str(error)
        message = message if name in message else f"{name}: {message}"
        return _broken(asked.case, message, error.exit_code)


def _judged(asked: _Asked, answers: Answers) -> Judged:
    if isinstance(asked.job, PeftplanError):
        raise asked.job
    case = asked.case
    if not case.limits.any_for(asked.job):
        raise RequestError(f"{case.source.name}: no limit to hold it against; give a GPU or a maximum")
    answer = answers.of(asked.job)
    base = _answer_before(asked, answers)
    held = tuple(judge.held(answer, case.limits, base))
    result = Judged(
        budget=case.budget,
        config=case.source.name,
        status=worst([h.status for h in held]),
        model=answer.job.model,
        gpu=answer.fit.gpu,
        verdict=answer.fit.verdict,
        device_bytes=answer.memory.device_bytes,
        base_device_bytes=base.memory.device_bytes if isinstance(base, Estimate) else None,
        usd_total=answer.cost.usd_total,
        hours=judge.hours(answer),
        limits=held,
        levers=tuple(_levers(asked, held, answers)),
        unpriced=tuple(remark for remark in asked.job.remarks if remark.what in asked.job.extras),
    )
    return result if result.status != "error" else _unknown(result)


def _answer_before(asked: _Asked, answers: Answers) -> Estimate | str | None:
    if not isinstance(asked.base, Job):
        return asked.base
    try:
        return answers.of(asked.base)
    except PeftplanError as error:
        return f"not priced at the base revision: {error}"


def _levers(asked: _Asked, held: Iterable[Held], answers: Answers) -> list[Lever]:
    """The lines to blame for the first broken limit."""
    case, broken = asked.case, next((h for h in held if h.status == "over"), None)
    if broken is None or case.source.path is None:
        return []
    unit: Unit = "usd" if broken.unit == "usd" else "seconds per token" if broken.unit == "hours" else "bytes"

    def measure(text: str) -> float | int | None:
        return judge.taken(answers.of(case.limits.asked(case.source.read(text))), unit)

    place = Place(file=sources.shown(case.source.path), measure=measure, unit=unit)
    return levers.blame(asked.text, asked.before, model=case.source.read(asked.text).model, place=place)


def _broken(case: _Case, message: str, code: int) -> Judged:
    return Judged(budget=case.budget, config=case.source.name, status="error", error=message, error_code=code)


def _unknown(result: Judged) -> Judged:
    why = "; ".join(f"{h.limit.replace('_', '-')}: {h.why}" for h in result.limits if h.status == "error")
    return result.model_copy(update={"error": f"{result.config}: cannot be judged: {why}", "error_code": 2})
