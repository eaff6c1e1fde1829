"""Trainers: `get("trl")` is the file `trl.py`; `names()` is the folder; each reads and writes its own config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftplan import datafile, methods, plugins
from peftplan.errors import BadFile, RequestError, Unsupported
from peftplan.job import Assumption, Job
from peftplan.trainers import _accelerate, _deepspeed, _script
from peftplan.trainers.base import Folder, Run, Trainer, decided
from peftplan.trainers.rules import Inexpressible, flatten

__all__ = [
    "Folder",
    "Run",
    "Trainer",
    "get",
    "names",
    "read_config",
    "read_configs",
    "recognize",
    "support",
    "write_folder",
]


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
    data = _data(path, text)
    if _beside(data) is not None:
        raise BadFile(f"{path}: says only how a job is spread over GPUs; give the trainer's config with it")
    return recognize(data, name=str(path)).read(data, name=str(path))


def read_configs(paths: Sequence[Path]) -> Job:
    """The Job of files given together: one trainer's config, and accelerate's YAML or DeepSpeed's JSON beside it.

    What they say of GPUs and how the job is spread goes before the config's own. Raises BadFile and RequestError.
    """
    found = {path: _data(path, None) for path in paths}
    beside = {path: kind for path, data in found.items() if (kind := _beside(data)) is not None}
    own = [path for path in paths if path not in beside]
    if len(own) != 1:
        several = " and ".join(map(str, own or paths))
        raise BadFile(f"{several}: give one trainer's config" + (" with them" if not own else ", not several"))
    job = recognize(found[own[0]], name=str(own[0])).read(found[own[0]], name=str(own[0]))
    for path in sorted(beside, key=lambda path: beside[path] is _deepspeed.read):  # it goes before accelerate's
        job = _spread(job, path, *beside[path](found[path]))
    return job


Beside = Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], list[Assumption]]]
_POINTERS = ("deepspeed", "deepspeed_config.deepspeed_config_file")
"""Keys that name a DeepSpeed file; what was guessed from its name."""


def _beside(data: Mapping[str, Any]) -> Beside | None:
    """The reader of a file that says how a job is spread, and nothing else."""
    if _deepspeed.SIGNATURE & set(data):
        return _deepspeed.read
    return _accelerate.read if len(_accelerate.SIGNATURE & set(data)) > 1 else None


def _spread(job: Job, path: Path, fields: Mapping[str, Any], remarks: list[Assumption]) -> Job:
    for name in ("micro_batch", "grad_accum"):
        if name in fields and fields[name] != getattr(job, name):
            raise RequestError(f"{path}: {name} {fields[name]} contradicts the config's {getattr(job, name)}")
    new = {key: value for key, value in fields.items() if key != "precision" or job.precision is None}
    named = _POINTERS if path.suffix == ".json" else ()
    kept = [remark for remark in job.remarks if remark.what not in named]
    return job.model_copy(update={**new, "remarks": (*kept, *remarks)})


def _data(path: Path, text: str | None) -> dict[str, Any]:
    """The mapping in a YAML or JSON file, or the literal that a Python file calls CONFIG. Raises BadFile."""
    text = datafile.text_of(path) if text is None else text
    if path.suffix == ".py":
        return _script.constants(text, name=str(path))
    data = datafile.parse(text, str(path), dialect="pyyaml")
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise BadFile(f"{path}: expected a mapping of a trainer's keys, found {datafile.kind(data)}")
    return data


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
    jobs = {name: example(name) for name in (*methods.names(), *methods.aliases())}
    return {method: {name: _can(get(name), job) for name in names()} for method, job in sorted(jobs.items())}


def example(method: str, model: str = "llama-7b") -> Job:
    """A job of that method: its defaults, or its first example where those do not say enough."""
    job = Job(model=model, method=method)
    try:
        decided(job)
    except RequestError:
        return job.model_copy(update={"settings": {f"method.{k}": v for k, v in methods.example(method).items()}})
    return job


def _can(trainer: Trainer, job: Job) -> bool:
    try:
        trainer.config(job, Run())
    except (Inexpressible, RequestError):
        return False
    return True
