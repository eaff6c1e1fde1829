"""A campaign: jobs chosen to separate effects, measured in one call. Reads its file; `campaign_run` runs it.

```yaml
schema: peftplan.campaign/1
name: widths
about: What each of sequence, batch and rank costs.
budget: 9m                        # of the whole call, unless the call says otherwise
warm_up: 2                        # steps before the one that is read
timed: 3
base: {model: llama-3.1-8b, method: lora, micro_batch: 1, seq_len: 1024, set: {model.num_hidden_layers: 4}}
runs:
  - name: sequence
    vary: {seq_len: [512, 2048]}  # one run for each: sequence-512, sequence-2048
  - name: edge
    job: {micro_batch: 64}        # over the base, `set` key by key
    limit: 16GiB                  # a smaller card than there is
```

Needs no torch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from peftplan import datafile
from peftplan.errors import BadFile, RequestError
from peftplan.instruments.request import Settings, limit
from peftplan.job import Job, make_job

SCHEMA: Literal["peftplan.campaign/1"] = "peftplan.campaign/1"
MOST_RUNS = 500
_UNITS = {"s": 1, "m": 60, "h": 3600}


def parse_seconds(text: str) -> float:
    """Seconds of `90s`, `10m`, `1.5h`, or a plain number. Raises RequestError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([smh]?)\s*", text)
    if match is None or float(match[1]) == 0:
        raise RequestError(f"cannot read {text!r} as a time; write it like 90s, 10m or 1.5h")
    return float(match[1]) * _UNITS[match[2] or "s"]


def _slug(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,79}", text):
        raise ValueError("a name has letters, digits and . _ = - only")
    return text


Name = Annotated[str, AfterValidator(_slug)]
Steps = Annotated[int, Field(ge=0, le=1000)]


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Entry(_Closed):
    name: Name
    about: str = ""
    job: dict[str, Any] = Field(default_factory=dict)
    vary: dict[str, list[Any]] = Field(default_factory=dict)
    """Values of job fields, or of settings by their dotted key; every combination is a run."""
    limit: str | None = None


class _File(_Closed):
    schema_: Literal["peftplan.campaign/1"] = Field(alias="schema")
    name: Name
    about: str = ""
    budget: str | None = None
    warm_up: Steps = 2
    timed: Steps = 3
    base: dict[str, Any] = Field(default_factory=dict)
    runs: list[_Entry] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """One run to come."""

    name: str
    job: Job
    settings: Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Campaign:
    """A campaign file, read."""

    name: str
    about: str
    budget_seconds: float | None
    runs: tuple[Planned, ...]


def read(path: Path, *, device: str) -> Campaign:
    """The campaign in a file, for a device. Raises BadFile, and RequestError for a run that is no job."""
    data = datafile.load(path)
    if not isinstance(data, dict):
        raise BadFile(f"{path}: expected a campaign, found {datafile.kind(data)}")
    if data.get("schema") != SCHEMA:
        raise BadFile(f"{path}: schema {data.get('schema')!r} is not {SCHEMA}")
    try:
        file = _File.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadFile(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None
    runs = tuple(itertools.islice(_runs(path, file, device), MOST_RUNS + 1))
    _check(path, runs)
    budget = None if file.budget is None else parse_seconds(file.budget)
    return Campaign(name=file.name, about=file.about, budget_seconds=budget, runs=runs)


def _check(path: Path, runs: tuple[Planned, ...]) -> None:
    if len(runs) > MOST_RUNS:
        raise BadFile(f"{path}: more than {MOST_RUNS} runs; split the campaign")
    seen: set[str] = set()
    for run in runs:
        if run.name in seen:
            raise BadFile(f"{path}: two runs are called {run.name!r}; give each a name of its own")
        seen.add(run.name)


def _runs(path: Path, file: _File, device: str) -> Iterator[Planned]:
    for entry in file.runs:
        yield from _of_entry(f"{path}: run {entry.name}", entry, file, device)


def _of_entry(where: str, entry: _Entry, file: _File, device: str) -> Iterator[Planned]:
    try:
        settings = Settings(device=device, warm_up=file.warm_up, timed=file.timed, limit_bytes=limit(entry.limit))
        for name, varied in _varied(entry):
            yield Planned(name=name, job=_job(file.base, entry.job, varied), settings=settings)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None


def _varied(entry: _Entry) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what differs) of each combination."""
    for values in itertools.product(*entry.vary.values()):
        named = (re.sub(r"[^A-Za-z0-9.]+", "_", str(value)).strip("_") or "none" for value in values)
        yield "-".join((entry.name, *named)), dict(zip(entry.vary, values, strict=True))


def _job(base: dict[str, Any], own: dict[str, Any], varied: dict[str, Any]) -> Job:
    fields = {key: value for key, value in varied.items() if "." not in key}
    knobs = {key: value for key, value in varied.items() if "." in key}
    settings = {**(base.get("set") or {}), **(own.get("set") or {}), **knobs}
    return make_job(**{**base, **own, **fields, "set": settings})
