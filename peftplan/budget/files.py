"""Budgets in `peftplan.toml`, or in `pyproject.toml` under `[tool.peftplan]`.

The top of the table is the limits of every budget; with `configs` (files or globs) or `job` (a job's own fields) it is
a budget itself. More of them are `[[budgets]]`, whose limits go before those of the top.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peftplan import datafile
from peftplan.budget import sources
from peftplan.budget.limits import Limits, make_limits
from peftplan.budget.sources import Source
from peftplan.errors import BadFile, RequestError
from peftplan.job import Job, make_job

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAMES = ("peftplan.toml", "pyproject.toml")
_OWN = ("name", "configs", "job")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits of some configurations."""

    name: str
    limits: Limits
    configs: tuple[str, ...] = ()
    job: dict[str, Any] | None = None


def find(folder: Path) -> Path | None:
    """The budget file of `folder` or of the nearest folder above that has one."""
    for place in (folder, *folder.parents):
        for path in (Path(sources.shown(place / name)) for name in NAMES):
            if path.is_file() and _table(path, datafile.text_of(path)) is not None:
                return path
    return None


def read(path: Path, text: str | None = None) -> tuple[Budget, ...]:
    """The budgets in `path`, or in `text` as if it were the file's. Raises BadFile and RequestError."""
    name = sources.shown(path)
    table = _table(path, datafile.text_of(path) if text is None else text)
    if table is None:
        raise BadFile(f"{name}: holds no [tool.peftplan]")
    top = _spelled(table)
    listed = top.pop("budgets", [])
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise BadFile(f"{name}: budgets must be tables, each headed [[{_prefix(path)}budgets]]")
    _limits(top, name)
    common = {key: value for key, value in top.items() if key not in _OWN}
    entries = [top] if "configs" in top or "job" in top else []
    entries += [{**common, **_spelled(entry)} for entry in listed]
    if not entries:
        raise BadFile(f"{name}: states no budget; give `configs` with files or globs, or `job`")
    return tuple(_budget(entry, f"{name}: budget {i}") for i, entry in enumerate(entries, start=1))


def members(path: Path, budgets: tuple[Budget, ...]) -> Iterator[tuple[Budget, Source]]:
    """Every configuration under its budget. A file that is not there, or a glob that matches none, is one that cannot
    be read."""
    for budget in budgets:
        if budget.job is not None:
            read_it = partial(_inline, path, budget.name)
            yield budget, Source(name=f"{sources.shown(path)}: {budget.name}", path=path, read=read_it)
        found = (source for pattern in budget.configs for source in _matching(path.parent, pattern))
        yield from ((budget, source) for source in {source.name: source for source in found}.values())


def _matching(folder: Path, pattern: str) -> Iterator[Source]:
    if not glob.has_magic(pattern):
        yield sources.of_file(folder / pattern)
        return
    found = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
    files = [folder / name for name in found if (folder / name).is_file()]
    if not files:
        where = "" if folder == Path() else f" in {folder}"
        yield sources.of_nothing(pattern, f"{pattern}: matches no file{where}")
    yield from map(sources.of_file, files)


def _inline(path: Path, name: str, text: str) -> Job:
    """The job of a budget in the `text` of its file: the one of that name, where the text is another revision's."""
    same = [budget for budget in read(path, text) if budget.name == name]
    if not same or same[0].job is None:
        raise BadFile(f"{path}: no job of the budget {name}")
    try:
        return make_job(**same[0].job)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from None


def _table(path: Path, text: str) -> dict[str, Any] | None:
    """The part of the TOML file that is peftplan's."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadFile(f"{sources.shown(path)}: not valid TOML: {error}") from None
    for key in _prefix(path).split(".")[:-1]:
        data = data.get(key) if isinstance(data, dict) else None
    if data is not None and not isinstance(data, dict):
        raise BadFile(f"{sources.shown(path)}: [tool.peftplan] must be a table")
    return data


def _prefix(path: Path) -> str:
    return "tool.peftplan." if path.name == "pyproject.toml" else ""


def _spelled(table: dict[str, Any]) -> dict[str, Any]:
    """`-` and `_` are the same in a key."""
    return {key.replace("-", "_"): value for key, value in table.items()}


def _budget(entry: dict[str, Any], where: str) -> Budget:
    configs, job = _configs(entry, where), entry.get("job")
    if (job is None) == (not configs):
        raise RequestError(f"{where}: give either `configs` with files or globs, or `job` with a job's fields")
    if job is not None and not isinstance(job, dict):
        raise RequestError(f'{where}: `job` must be a table of a job\'s fields, such as {{ model = "llama-7b" }}')
    name = str(entry.get("name", where.rpartition(": ")[2]))
    return Budget(name=name, limits=_limits(entry, where), configs=configs, job=job)


def _limits(entry: dict[str, Any], where: str) -> Limits:
    limits = {key: value for key, value in entry.items() if key not in _OWN}
    return make_limits(limits, where=f"{where}: ", beside=(*_OWN, "budgets"))


def _configs(entry: dict[str, Any], where: str) -> tuple[str, ...]:
    given = entry.get("configs", [])
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, list) or not all(isinstance(c, str) and c.strip() for c in listed):
        raise RequestError(f"{where}: `configs` must be a list of files or globs")
    return tuple(listed)
