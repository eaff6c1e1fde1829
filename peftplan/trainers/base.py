"""What a trainer is: rules that read its config into a Job and write a Job as its config."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, TypeVar, final

from peftplan import formats, methods, optimizers
from peftplan.arch import catalog
from peftplan.errors import RequestError, Unsupported
from peftplan.job import Assumption, Job, make_job
from peftplan.plugins import canonical
from peftplan.resolve import ATTENTION, resolve
from peftplan.trainers.rules import Config, Fields, Inexpressible, Rule, StandIn, covers, flatten, nest
from peftplan.training_loop import projection

Answer = TypeVar("Answer")
NOT_CONFIG = {
    "config", "trainer", "extras", "remarks", "set", "gpu", "usd_per_hour", "tokens", "backend", "task",
}  # fmt: skip
"""Fields that say where or how long, not what is configured."""
_BEHAVIOUR = ("loop.", "loss.", "allocator.", "model.")
"""Settings that the trainer and the library versions decide, not its config."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "layout": ("none", "single"), "offload": ("none",), "kernels": ("hf",), "adapter_dtype": ("auto",),
    "gpus": (1,), "nodes": (1,),
}  # fmt: skip
_TWICE = ("method.r", "method.target_modules")
"""Settings that a decided job also says in a field of its own."""
_MACHINE = ("gpus", "nodes", "layout", "offload")


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
    renamed: ClassVar[Mapping[str, str]] = {}
    """Keys of older versions, and what they are called now."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Fields that files beside the config state, such as accelerate's."""
    harmless: ClassVar[frozenset[str]]
    """Patterns of keys that cannot move memory (data, logging, saving, schedules)."""
    instead: ClassVar[Mapping[str, StandIn]] = {}
    """Patterns of keys of no rule that move memory and are not modelled."""
    proved: ClassVar[str] = "Nothing was trained with it; its keys are those of the pinned version."
    """What the tests have run of what is written, and what they have only parsed."""
    half_on_cpu: ClassVar[bool] = True
    """Whether it trains in bf16 where there is no GPU; else its dry run is in fp32."""
    whole: ClassVar[frozenset[str]] = frozenset()
    """Keys whose mappings are values (ranks by module name), not sections."""

    @final
    def read(self, config: Mapping[str, Any], *, name: str) -> Job:
        """The Job that a config states, with this trainer's defaults. `name` is what errors call it.

        Keys of no rule are kept in `extras`; those among them that could move memory are named in `remarks`.
        Raises RequestError.
        """
        flat = {self.renamed.get(key, key): value for key, value in flatten(config, whole=self.whole).items()}
        fields, silent = self._fields(flat, name)
        unread = {key: value for key, value in flat.items() if not self._claimed(key)}
        instead: dict[str, str | None] = {}
        for rule in self.rules:
            instead.update(self._answer(rule, rule.stand_ins, flat, name))
        remarks = [Assumption(what=key, value=flat.get(key), why=why) for key, why in instead.items() if why]
        remarks += [self._unpriced(key, unread[key]) for key in unread if self._moves_memory(key, unread[key])]
        kept = {key for rule in self.rules for key in rule.kept(flat)}
        extras = {key: value for key, value in flat.items() if key in unread or key in kept}
        return _job({**fields, "trainer": self.name, "extras": extras, "remarks": [*remarks, *silent]})

    @final
    def config(self, job: Job, run: Run) -> dict[str, Any]:
        """The config that states `job`, nested as the trainer's file is.

        Raises Inexpressible for what it has no key for, RequestError for a job that is wrong.
        """
        full = self.settled(decided(job), asked=job)
        fields = fields_of(full)
        self.refuse(fields)
        for field, value in fields.items():
            if not self._speaks_for(field):
                raise Inexpressible(field, value)
        extras = self._kept(job, run)
        flat = self._written(fields, extras)
        unread = {key: value for key, value in extras.items() if not self._claimed(key)}
        keys = {**self._unasked(run), **unread, **self._asked(run)}
        return nest({**keys, **flat})

    def settled(self, full: Job, *, asked: Job) -> Job:
        """`full`, where this trainer decides otherwise what the job leaves open (a null of `asked`)."""
        del asked
        return full

    def refuse(self, fields: Fields) -> None:  # noqa: B027
        """Raises Inexpressible for combinations that this trainer is known not to run."""

    def _kept(self, job: Job, run: Run) -> Config:
        """What the config that the job was read from says besides; its dataset only where no other is given."""
        if job.trainer != self.name:
            return {}
        replaced = self.dataset_keys if run.dataset is not None else ()
        return {key: value for key, value in job.extras.items() if key.partition(".")[0] not in replaced}

    def _unasked(self, run: Run) -> Config:
        """A run's defaults; no placeholder beside a dataset that is given."""
        default = self.run_keys(Run())
        return {key: value for key, value in default.items() if run.dataset is None or key not in self.dataset_keys}

    def _asked(self, run: Run) -> Config:
        """The run's keys where they are not a run's defaults."""
        silent = self.run_keys(Run())
        return {key: value for key, value in self.run_keys(run).items() if key not in silent or silent[key] != value}

    def _speaks_for(self, field: str) -> bool:
        rules = any(rule.speaks_for(field) for rule in self.rules)
        return rules or field in self.beside or field.startswith(_BEHAVIOUR)

    def _claimed(self, key: str) -> bool:
        return any(rule.claims(key) for rule in self.rules)

    def _written(self, fields: Fields, extras: Config) -> dict[str, Any]:
        """What the rules write; in place of a rule's own keys those of the config read before, while they still mean
        what the job says."""
        each = [rule.write(fields) for rule in self.rules]
        flat = {key: value for keys in each for key, value in keys.items()}
        for rule, keys in zip(self.rules, each, strict=True):
            own = {key: value for key, value in extras.items() if rule.claims(key)}
            others = {key: value for key, value in flat.items() if key not in keys}
            if own and rule.means({**others, **own}, fields):
                flat = {**others, **own}
        return flat

    @final
    def stated(self, job: Job, run: Run) -> Job:
        """`job` as the written config states it, this trainer's own behaviour included, on the job's machine."""
        back = self.read(self.config(job, run), name=self.name)
        asked = ("config", "gpu", "usd_per_hour", "tokens", "backend", *self.beside)
        where = {name: getattr(job, name) for name in asked}
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
            stated = self._answer(rule, rule.read, flat, name)
            silent = {f: v for f, v in self._answer(rule, rule.defaults, flat, name).items() if f not in stated}
            fields.update({**silent, **stated})
            remarks += [Assumption(what=f, value=v, why=self._default_of(f)) for f, v in silent.items()]
        return fields, remarks

    def _answer(self, rule: Rule, ask: Callable[[Config], Answer], flat: Config, name: str) -> Answer:
        """What the rule answers. Raises RequestError in one line for a value that it cannot take."""
        try:
            return ask(flat)
        except RequestError as error:
            kind = Unsupported if isinstance(error, Unsupported) else RequestError
            raise kind(f"{name}: {error}") from None
        except (TypeError, ValueError, AttributeError):  # a list or a mapping where the rule reads a word or a number
            given = ", ".join(f"{key}: {flat[key]!r}" for key in flat if rule.claims(key))
            raise RequestError(f"{name}: {self.title} takes no such value: {given}") from None

    def _default_of(self, field: str) -> str:
        return f"{self.title}'s default" if not field.startswith(_BEHAVIOUR) else f"what {self.title} does"

    def _moves_memory(self, key: str, value: Any) -> bool:
        return value not in (None, False) and not covers(self.harmless, key)

    def _unpriced(self, key: str, value: Any) -> Assumption:
        why = f"a key of {self.title} that is not priced; it could move memory either way"
        for pattern, errs in self.instead.items():
            if covers((pattern,), key):
                return Assumption(what=key, value=value, why=errs.why())
        known = known_keys(self.name)
        if known and not _is_known(key, known):
            near = difflib.get_close_matches(key, known, n=1)
            why = f"not a key of {self.requirements[0]}" + (f"; did you mean {near[0]}?" if near else "")
        return Assumption(what=key, value=value, why=why)


@lru_cache
def known_keys(name: str) -> frozenset[str]:
    """The top-level keys of a trainer's pinned version; empty where no list is packaged."""
    file = resources.files(__package__).joinpath("keys").joinpath(f"{name}.txt")
    if not file.is_file():
        return frozenset()
    return frozenset(line for line in file.read_text("utf-8").splitlines() if line and not line.startswith("#"))


def _is_known(key: str, known: frozenset[str]) -> bool:
    """Listed itself, or below a listed key whose own keys are not."""
    head = key.partition(".")[0]
    return key in known or (head in known and not any(other.startswith(head + ".") for other in known))


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
    moved = str(fields.pop("offload", "")).split("+")
    if moved != [""]:
        rest = "+".join(part for part in moved if part != "activations")
        fields |= ({"offload": rest} if rest else {}) | ({"recompute.offload": True} if "activations" in moved else {})
    fields["model"] = job.model if Path(job.model).exists() else catalog.hub_id(job.model)
    if job.format is not None and formats.get(job.format)().packed:
        fields["format"] = formats.canonical(job.format)
    fields.update(_method_fields(job))
    own = projection(job)
    if own is not None:
        asked = {"rank": fields.pop("rank", None), "optim_target_modules": fields.pop("target_modules", None)}
        known = optimizers.get(own).__dataclass_fields__
        unusual = {key: value for key, value in asked.items() if value not in (None, known[key].default)}
        fields.update({f"optimizer.{key}": value for key, value in unusual.items()})
    if job.optimizer is not None:
        fields["optimizer"], implied = optimizers.resolve_name(job.optimizer)
        fields.update({f"optimizer.{key}": value for key, value in implied.items()})
    if job.attention is not None:
        fields["attention"] = ATTENTION.get(canonical(job.attention), job.attention)
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
    elif name != method and not implied and methods.optimizer_of(name) is None:
        yield "variant", name


def _job(fields: Fields) -> Job:
    names = set(Job.model_fields)
    plain = {key: value for key, value in fields.items() if key in names}
    settings = {key: value for key, value in fields.items() if "." in key}
    if "variant" in fields:
        plain["method"] = fields["variant"]
    return make_job(**plain, set=settings)
