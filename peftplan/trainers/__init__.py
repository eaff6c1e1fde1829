"""Trainers: `get("trl")` is the file `trl.py`; `names()` is the folder; each reads and writes its own config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftplan import datafile, methods, plugins
from peftplan.errors import BadFile, RequestError, Unsupported
from peftplan.job import Job
from peftplan.trainers.base import Folder, Run, Trainer
from peftplan.trainers.rules import Inexpressible, flatten

__all__ = ["Folder", "Run", "Trainer", "get", "names", "read_config", "recognize", "support", "write_folder"]


def names() -> tuple[str, ...]:
    return plugins.names(__name__)


_ALSO = {"ms_swift": "swift", "llama_factory": "llamafactory"}
"""Names that trainers go by too."""


def get(name: str) -> Trainer:
    """The trainer of that name. Raises UnknownName."""
    known = plugins.canonical(name)
    trainer: Trainer = plugins.load(__name__, "trainer", _ALSO.get(known, known)).TRAINER()
    return trainer


def read_config(path: Path, *, text: str | None = None) -> Job:
    """The Job that any trainer's config file states; the trainer is known by the keys.

    `text` is read in place of the file's own (another revision of it). YAML or JSON, never executed. Raises BadFile
    and RequestError.
    """
    data = datafile.parse(datafile.text_of(path) if text is None else text, str(path), dialect="pyyaml")
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise BadFile(f"{path}: expected a mapping of a trainer's keys, found {datafile.kind(data)}")
    return recognize(data, name=str(path)).read(data, name=str(path))


def recognize(config: Mapping[str, Any], *, name: str) -> Trainer:
    """The trainer whose signature keys the config holds most of. Raises BadFile where it holds none's."""
    keys = set(flatten(config))
    scores = {trainer: len(get(trainer).signature & (keys | set(config))) for trainer in names()}
    best = max(scores, key=lambda trainer: scores[trainer])
    if not scores[best]:
        known = ", ".join(get(trainer).title for trainer in names())
        raise BadFile(f"{name}: not the config of a trainer that is read; known: {known}")
    return get(best)


def write_folder(job: Job, *, trainer: str, run: Run) -> Folder:
    """What to put on disk to train `job`. Raises Unsupported with the trainers that can, where this one cannot."""
    writer = get(trainer)
    try:
        return writer.folder(job, run)
    except Inexpressible as missing:
        able = ", ".join(name for name in names() if _can(get(name), job)) or "no trainer peftplan writes for"
        raise Unsupported(f"{writer.title} has no key for {missing}; can: {able}") from None


def support() -> dict[str, dict[str, bool]]:
    """{method: {trainer: whether its config can say it}}, asked of the trainers themselves."""
    jobs = {name: Job(model="llama-7b", method=name) for name in (*methods.names(), *methods.aliases())}
    return {method: {name: _can(get(name), job) for name in names()} for method, job in sorted(jobs.items())}


def _can(trainer: Trainer, job: Job) -> bool:
    try:
        trainer.config(job, Run())
    except (Inexpressible, RequestError):
        return False
    return True
