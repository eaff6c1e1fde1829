"""A file that states a job, whoever wrote it: a Job, the JSON of an estimate, or a trainer's own config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftplan import datafile, trainers
from peftplan.errors import BadFile, RequestError, UnknownName
from peftplan.job import Job, make_job
from peftplan.resolve import PREFIXES


def read_job(path: Path, *, text: str | None = None) -> Job:
    """The Job that the file `path` states; `text` is read in place of its own (another revision of it).

    A mapping whose keys are mostly a Job's fields is one; any other is a trainer's config. Raises BadFile and
    RequestError, naming the file.
    """
    text = datafile.text_of(path) if text is None else text
    data = datafile.parse(text, str(path), dialect="pyyaml")
    if isinstance(data, dict) and data and not _is_job(data):
        return trainers.read_config(path, text=text)
    stated = fields(path, text=text)
    try:
        return make_job(**stated)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def _is_job(data: dict[Any, Any]) -> bool:
    known = sum(key == "set" or key in Job.model_fields for key in data)
    return "schema" in data or 2 * known >= len(data)


def fields(path: Path, *, text: str | None = None) -> dict[str, Any]:
    """The fields of the Job in `path`: a Job, or a peftplan output, whose `job` is taken. Raises BadFile."""
    data = datafile.parse(datafile.text_of(path) if text is None else text, str(path))
    if not isinstance(data, dict):
        raise BadFile(f"{path}: expected a mapping of job fields, found {datafile.kind(data)}")
    if str(data.get("schema", "")).startswith("peftplan."):
        data = data.get("job")
        if not isinstance(data, dict):
            raise BadFile(f"{path}: this peftplan output holds no job")
    return _checked(path, data)


def _checked(path: Path, data: dict[Any, Any]) -> dict[str, Any]:
    for key in data:
        if not isinstance(key, str):
            raise BadFile(f"{path}: the field name {key!r} is not text")
    settings = data.get("set")
    if settings is not None and not isinstance(settings, dict):
        raise BadFile(f"{path}: `set` must be a mapping such as method.lora_dropout: 0.1")
    for key in settings or {}:
        if str(key).partition(".")[0] not in PREFIXES:
            raise UnknownName(f"prefix in {path}: set", str(key).partition(".")[0], PREFIXES)
    return {key: value for key, value in data.items() if value is not None}
