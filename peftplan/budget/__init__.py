"""Budgets for configurations: `check` says which ones break theirs, and on which line. For pull requests and CI."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from peftplan.budget import files, judge, levers, sources
from peftplan.budget.judge import Answers
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


def check(
    *configs: Job | Path | str, limits: Limits | None = None, budgets: Path | str | None = None, base: str | None = None
) -> Check:
    """Which configurations keep within their budgets.

    With `limits`, every one of `configs` (a Job, a job file or a trainer's config file) is held against them. Without,
    budgets are those of the file `budgets`, or of the nearest peftplan.toml or pyproject.toml; `configs` then picks
    those to judge. `base` is a git revision for `max_growth` and for naming what changed.

    A configuration that cannot be read or judged is a result of its own; the others are judged. Raises RequestError
    where the request itself or the budget file is wrong.
    """
    cases = _cases(configs, limits, Path(budgets) if budgets is not None else None)
    answers = Answers()
    before = _base_texts(cases, base)
    results = tuple(_Judge(answers=answers, base=base, before=before).judged(case) for case in cases)
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


@dataclass(frozen=True, kw_only=True)
class _Judge:
    answers: Answers
    base: str | None
    before: dict[Path, str | None] = field(default_factory=dict)

    def judged(self, case: _Case) -> Judged:
        try:
            return self._judged(case)
        except PeftplanError as error:
            return _broken(case, str(error), error.exit_code)

    def _judged(self, case: _Case) -> Judged:
        text = case.source.text()
        asked = case.limits.asked(case.source.read(text))
        if not case.limits.any_for(asked):
            raise RequestError(f"{case.source.name}: no limit to hold it against; give a GPU or a maximum")
        answer = self.answers.of(asked)
        base = self._base(case)
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
            levers=tuple(self._levers(case, text, held)),
        )
        return result if result.status != "error" else _unknown(result, case)

    def _base(self, case: _Case) -> Estimate | str | None:
        """The answer at the base revision, or why there is none."""
        if self.base is None or case.source.path is None:
            return None
        text = self.before.get(case.source.path)
        if text is None:
            return f"new since {self.base}"
        try:
            return self.answers.of(case.limits.asked(case.source.read(text)))
        except PeftplanError as error:
            return f"not read at {self.base}: {error}"

    def _levers(self, case: _Case, text: str, held: Iterable[Held]) -> list[Lever]:
        broken = next((h for h in held if h.status == "over"), None)
        if broken is None or case.source.path is None:
            return []
        unit: Unit = "usd" if broken.unit == "usd" else "seconds per token" if broken.unit == "hours" else "bytes"

        def measure(text: str) -> float | int | None:
            return _taken(self.answers.of(case.limits.asked(case.source.read(text))), unit)

        file, before = sources.shown(case.source.path), self.before.get(case.source.path)
        if before is not None and before != text:
            found = levers.changed(text, before, file=file, measure=measure, unit=unit)
            if found:
                return found
        found = levers.driving(text, file=file, measure=measure, unit=unit)
        return found or levers.naming(text, case.source.read(text).model, file=file, unit=unit)


def _taken(answer: Estimate, unit: Unit) -> float | int | None:
    """What a broken limit counts, as far as it costs no replay of the allocator."""
    if unit == "usd":
        return answer.cost.usd_total
    if unit == "bytes":
        return answer.memory.peak_bytes
    return 1 / answer.time.tokens_per_second if answer.time.tokens_per_second else None


def _broken(case: _Case, message: str, code: int) -> Judged:
    if case.source.name not in message:
        message = f"{case.source.name}: {message}"
    return Judged(budget=case.budget, config=case.source.name, status="error", error=message, error_code=code)


def _unknown(result: Judged, case: _Case) -> Judged:
    why = "; ".join(f"{h.limit}: {h.why}" for h in result.limits if h.status == "error")
    return result.model_copy(update={"error": f"{case.source.name}: cannot be judged: {why}", "error_code": 2})
