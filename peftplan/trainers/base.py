"""What a trainer is: rules that read its config into a Job and write a Job as its config."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import resources
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, final

from peftplan import formats, methods
from peftplan.errors import RequestError
from peftplan.job import Assumption, Job, make_job
from peftplan.plugins import canonical
from peftplan.resolve import ATTENTION, resolve
from peftplan.trainers.rules import Config, Fields, Inexpressible, Rule, flatten, nest

Answer = TypeVar("Answer")
NOT_CONFIG = {
    "config", "trainer", "extras", "remarks", "set", "gpu", "usd_per_hour", "tokens", "backend", "task",
}  # fmt: skip
"""Fields that say where or how long, not what is configured."""
_BEHAVIOUR = ("loop.", "loss.", "allocator.", "model.", "format.prepare", "format.cast_back")
"""Settings that the trainer and the library versions decide, not its config."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "layout": ("none", "single"), "offload": ("none",), "kernels": ("hf",), "adapter_dtype": ("auto",),
    "gpus": (1,), "nodes": (1,),
}  # fmt: skip
_TWICE = ("method.r", "method.target_modules")
"""Settings that a decided job also says in a field of its own."""
_MACHINE = ("gpus", "nodes", "layout", "offload", "kernels")


RENDEZVOUS = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")
"""What every node of a run is told: of how many it is which, its processes, and where the first node listens."""
TORCHRUN = (
    "torchrun --nnodes $NNODES --node-rank $NODE_RANK --nproc-per-node $NPROC_PER_NODE"
    " --master-addr $MASTER_ADDR --master-port $MASTER_PORT"
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a training run needs that no memory depends on. A null is written as a placeholder to fill in."""

    dataset: str | None = None
    """A JSON-lines file of `{"messages": [...]}` rows, or a Hub dataset."""
    output_dir: str = "out"
    max_steps: int | None = None
    learning_rate: float = 1e-4
    seed: int = 42
    on_cpu: bool = False


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Files by relative name, and the one command that trains with them, run inside the folder once on every node.

    On several GPUs the command finds `RENDEZVOUS` in its environment: a trainer whose program takes flags instead
    writes them in terms of these variables, as `TORCHRUN` does.
    """

    files: Mapping[str, str]
    command: str
    program: str | None = None
    """What one process of it runs, as arguments of `python`, where torchrun or accelerate may start the processes."""


class Trainer(ABC):
    """A training program with a config. Subclasses hold facts; reading and writing are the same for all."""

    name: ClassVar[str]
    title: ClassVar[str]
    homepage: ClassVar[str]
    requirements: ClassVar[tuple[str, ...]]
    """Pinned: the versions whose keys and defaults the rules state."""
    rules: ClassVar[tuple[Rule, ...]]
    signature: ClassVar[frozenset[str]]
    """Keys that tell this trainer's config from the others'."""
    dataset_keys: ClassVar[tuple[str, ...]]
    """The keys that name the dataset."""
    harmless: ClassVar[frozenset[str]]
    """Patterns of keys that cannot move memory (data, logging, saving, schedules)."""
    unpriced: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Patterns of keys that are not priced: what is priced instead, and which way that errs."""
    whole: ClassVar[frozenset[str]] = frozenset()
    """Keys whose mappings are values (ranks by module name), not sections."""

    @final
    def read(self, config: Mapping[str, Any], *, name: str) -> Job:
        """The Job that a config states, with this trainer's defaults. `name` is what errors call it.

        Keys of no rule are kept in `extras`; those among them that could move memory are named in `remarks`.
        Raises RequestError.
        """
        flat = flatten(config, whole=self.whole)
        fields, remarks = self._fields(flat, name)
        apart = {key: why for rule in self.rules for key, why in self._asked(rule, rule.apart, flat, name).items()}
        remarks += [Assumption(what=key, value=flat.get(key), why=why) for key, why in apart.items() if why]
        kept = {key: flat[key] for key in apart if key in flat}
        claimed = {key for rule in self.rules for key in rule.keys}
        extras = {key: value for key, value in flat.items() if key not in claimed}
        remarks += [self._unpriced(key, extras[key]) for key in extras if self._moves_memory(key, extras[key])]
        return _job({**fields, "trainer": self.name, "extras": {**extras, **kept}, "remarks": remarks})

    @final
    def config(self, job: Job, run: Run) -> dict[str, Any]:
        """The config that states `job`, nested as the trainer's file is.

        Raises Inexpressible for what it has no key for, RequestError for a job that is wrong.
        """
        full = self.settled(decided(job), asked=job)
        fields = fields_of(full)
        spoken = {field for rule in self.rules for field in rule.fields}
        for field, value in fields.items():
            if field not in spoken and not field.startswith(_BEHAVIOUR):
                raise Inexpressible(field, value)
        self.refuse(full, fields)
        extras = job.extras if job.trainer == self.name else {}
        flat: dict[str, Any] = {}
        for rule in self.rules:
            flat.update(_written(rule, fields, extras))
        return nest({**self.run_keys(run), **extras, **flat})

    def settled(self, full: Job, *, asked: Job) -> Job:
        """`full`, where this trainer decides otherwise what the job leaves open (a null of `asked`)."""
        del asked
        return full

    def refuse(self, full: Job, fields: Fields) -> None:  # noqa: B027
        """Raises Inexpressible or RequestError for combinations that this trainer is known not to run."""

    @final
    def stated(self, job: Job, run: Run) -> Job:
        """`job` as the written config states it, this trainer's own behaviour included, on the job's machine."""
        back = self.read(self.config(job, run), name=self.name)
        where = {name: getattr(job, name) for name in ("config", "gpu", "usd_per_hour", "tokens", "backend")}
        return back.model_copy(update=where)

    @abstractmethod
    def run_keys(self, run: Run) -> Config:
        """The flat keys that say what to train on, where to, how long."""

    @abstractmethod
    def folder(self, job: Job, run: Run) -> Folder:
        """What to put on disk to train `job`."""

    def _fields(self, flat: Config, name: str) -> tuple[dict[str, Any], list[Assumption]]:
        fields: dict[str, Any] = {}
        remarks: list[Assumption] = []
        for rule in self.rules:
            fields.update(self._asked(rule, rule.read, flat, name))
            for field, value in rule.defaults.items():
                if field not in fields:
                    fields[field] = value
                    remarks.append(Assumption(what=field, value=value, why=f"{self.title}'s default"))
        return fields, remarks

    def _asked(self, rule: Rule, ask: Callable[[Config], Answer], flat: Config, name: str) -> Answer:
        """What the rule answers. Raises RequestError in one line for a value that it cannot take."""
        try:
            return ask(flat)
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from None
        except (TypeError, ValueError, AttributeError):  # a list or a mapping where the rule reads a word or a number
            given = ", ".join(f"{key}: {flat[key]!r}" for key in rule.keys if key in flat)
            raise RequestError(f"{name}: {self.title} takes no such value: {given}") from None

    def _moves_memory(self, key: str, value: Any) -> bool:
        return value not in (None, False) and not any(fnmatchcase(key, pattern) for pattern in self.harmless)

    def _unpriced(self, key: str, value: Any) -> Assumption:
        why = f"a key of {self.title} that is not priced; it could move memory either way"
        for pattern, reason in self.unpriced.items():
            if fnmatchcase(key, pattern):
                return Assumption(what=key, value=value, why=reason)
        known = known_keys(self.name)
        if known and key.partition(".")[0] not in known:
            near = difflib.get_close_matches(key, known, n=1)
            why = f"not a key of {self.requirements[0]}" + (f"; did you mean {near[0]}?" if near else "")
        return Assumption(what=key, value=value, why=why)


def _written(rule: Rule, fields: Fields, extras: Config) -> Config:
    """What a rule writes; the keys that were kept apart, as long as they read as what the job says."""
    keys = rule.write(fields)
    original = {key: extras[key] for key in rule.keys if key in extras}
    if not original:
        return keys
    back = rule.read({**keys, **original})
    return {**keys, **original} if all(fields.get(field) == value for field, value in back.items()) else keys


@lru_cache
def known_keys(name: str) -> frozenset[str]:
    """The top-level keys of a trainer's pinned version; empty where no list is packaged."""
    file = resources.files(__package__).joinpath("keys").joinpath(f"{name}.txt")
    if not file.is_file():
        return frozenset()
    return frozenset(line for line in file.read_text("utf-8").splitlines() if line and not line.startswith("#"))


def decided(job: Job) -> Job:
    """`job` with every default decided; what spans several GPUs is passed on as it was asked."""
    asked = {name: getattr(job, name) for name in _MACHINE}
    alone = job.model_copy(update={name: Job.model_fields[name].default for name in _MACHINE})
    return resolve(alone).job.model_copy(update=asked)


def fields_of(job: Job) -> dict[str, Any]:
    """A job flat, in one spelling: a variant's name is its method and the settings it implies, a format is packed.

    `qlora` is lora on nf4 with double quantization; a variant without settings of its own (`lora_plus`) is the field
    `variant`; an unpacked format is what `dtype` says.
    """
    stated = job.model_dump(exclude_none=True, exclude=NOT_CONFIG | {"settings", "format"})
    fields = {name: value for name, value in stated.items() if value not in _NEUTRAL.get(name, ())}
    if job.format is not None and formats.get(job.format)().packed:
        fields["format"] = formats.canonical(job.format)
    if job.attention is not None:
        fields["attention"] = ATTENTION.get(canonical(job.attention), job.attention)
    fields.update(_method_fields(job))
    return {**fields, **{key: value for key, value in job.settings.items() if key not in _TWICE}}


def _method_fields(job: Job) -> Iterator[tuple[str, Any]]:
    method, implied = methods.resolve_name(job.method)
    yield "method", method
    for key, value in implied.items():
        yield f"method.{key}", value
    name = job.method.lower().replace("-", "_")
    if name in ("qlora", "qdora"):
        yield "format", job.format or "nf4"
        if (job.format or "nf4") in ("nf4", "fp4"):
            yield "format.double_quant", True
    elif name != method and not implied:
        yield "variant", name


def _job(fields: Fields) -> Job:
    names = set(Job.model_fields)
    plain = {key: value for key, value in fields.items() if key in names}
    settings = {key: value for key, value in fields.items() if "." in key}
    if "variant" in fields:
        plain["method"] = fields["variant"]
    return make_job(**plain, set=settings)
