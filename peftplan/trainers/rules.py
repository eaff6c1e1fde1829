"""Rules between a trainer's config and a job: each reads some keys into some fields, and writes them back.

Both sides are flat. A config's keys are dotted paths (`fsdp_config.offload_params`); a job's fields are its own names
and the dotted keys of its settings (`rank`, `method.lora_alpha`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from peftplan.errors import RequestError

Config = Mapping[str, Any]
Fields = Mapping[str, Any]


class Inexpressible(Exception):
    """A value of a job's field that the config has no word for."""

    def __init__(self, field: str, value: object) -> None:
        super().__init__(f"{field}={value}")
        self.field, self.value = field, value


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """What is priced in place of a value that is not modelled, and which way that errs."""

    value: Any = None
    """The field's value instead; None leaves it to the field's default."""
    errs: Literal["high", "low", "either way"]
    because: str = ""

    def why(self, field: str = "") -> str:
        """`not modelled; priced as optimizer adamw, which errs high: ...`"""
        instead = "as if it were off" if self.value is None else f"as {field} {self.value}".replace("  ", " ")
        way = "could err either way" if self.errs == "either way" else f"errs {self.errs}"
        return f"not modelled; priced {instead}, which {way}" + (f": {self.because}" if self.because else "")


Kept = Mapping[str, str | None]
"""{key: what is priced in place of its value and which way that errs}; None where it only has to be kept."""
StandIns = Callable[[Config], Kept]
"""Of the whole flat config: the keys that are priced as something else."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`read` sees the whole flat config and answers the fields it decides; `write` sees all fields and answers keys.

    `keys` are those it claims (`peft.*` all that begin so): no other rule reads them, and they are not kept apart.
    `fields` are those it speaks for: a job that says something of a field no rule speaks for cannot be written.
    `defaults` are what the trainer does where the config is silent. `stand_ins` names keys whose value is priced as
    something else: they are remarked on, and kept apart so that they are written back.
    """

    keys: tuple[str, ...]
    fields: tuple[str, ...]
    read: Callable[[Config], Fields]
    write: Callable[[Fields], Config]
    defaults: Callable[[Config], Fields]
    stand_ins: StandIns

    def claims(self, key: str) -> bool:
        return covers(self.keys, key)

    def speaks_for(self, field: str) -> bool:
        return covers(self.fields, field)

    def means(self, config: Config, fields: Fields) -> bool:
        """Whether the config says of this rule's fields what `fields` does."""
        heard = {**self.defaults(config), **self.read(config)}
        said = {field: value for field, value in fields.items() if self.speaks_for(field)}
        return all(fields.get(field) == heard.get(field) for field in heard.keys() | said.keys())

    def kept(self, config: Config) -> Config:
        """All keys of the config that it claims, where one of them stands for what is not modelled: they are written
        back together."""
        own = {key: value for key, value in config.items() if self.claims(key)}
        return own if own.keys() & self.stand_ins(config).keys() else {}


def covers(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the names, or of the patterns with a `*`, is this one."""
    return any(name == pattern or ("*" in pattern and fnmatchcase(name, pattern)) for pattern in patterns)


def _none(_: Config) -> Kept:
    return {}


def custom(
    keys: tuple[str, ...],
    fields: tuple[str, ...],
    *,
    read: Callable[[Config], Fields],
    write: Callable[[Fields], Config],
    defaults: Fields | Callable[[Config], Fields] | None = None,
    stand_ins: StandIns = _none,
) -> Rule:
    """A rule with code of its own: several keys say one thing, or one key several."""
    silent = defaults if callable(defaults) else lambda _: defaults or {}
    return Rule(keys=keys, fields=fields, read=read, write=write, defaults=silent, stand_ins=stand_ins)


def same(key: str, field: str, *, default: Any = None) -> Rule:
    """The key's value is the field's."""
    return custom(
        (key,),
        (field,),
        read=lambda config: {field: config[key]} if config.get(key) is not None else {},
        write=lambda fields: {key: _listed(fields[field])} if fields.get(field) is not None else {},
        defaults={} if default is None else {field: default},
    )


def words(key: str, field: str, meaning: Mapping[Any, Any], *, default: Any = None) -> Rule:
    """Each of the key's values stands for one of the field's; where two mean the same, the first one is written.

    A value that is not modelled means a `StandIn`; it is read, never written.
    """
    spoken: dict[Any, Any] = {}
    for word, value in meaning.items():
        if not isinstance(value, StandIn):
            spoken.setdefault(value, word)

    def read(config: Config) -> Fields:
        word = config.get(key)
        if word is None:
            return {}
        if word not in meaning:
            raise RequestError(f"{key}: {word!r} is not read; known: {', '.join(map(str, meaning))}")
        value = meaning[word]
        if isinstance(value, StandIn):
            return {} if value.value is None else {field: value.value}
        return {field: value}

    def write(fields: Fields) -> Config:
        value = fields.get(field)
        if value is None:
            return {}
        if value not in spoken:
            raise Inexpressible(field, value)
        return {key: spoken[value]}

    def stand_ins(config: Config) -> Kept:
        value = meaning.get(config.get(key))
        return {key: value.why(field)} if isinstance(value, StandIn) else {}

    fallback = {} if default is None else {field: default}
    return custom((key,), (field,), read=read, write=write, defaults=fallback, stand_ins=stand_ins)


def unpriced(key: str, errs: StandIn, *, off: tuple[Any, ...] = (None, False, 0), writes: Any = None) -> Rule:
    """A key that moves memory and is not modelled: priced as if it were off.

    Off it means what `off` holds; `writes`, where given, is written so that the default does not decide.
    """
    return custom(
        (key,),
        (),
        read=lambda _: {},
        write=lambda _: {} if writes is None else {key: writes},
        stand_ins=lambda config: {} if config.get(key) in off else {key: errs.why()},
    )


def does(field: str, value: Any, *, when: Callable[[Config], bool]) -> Rule:
    """What the trainer does in a case, whatever else its config says; a job that says otherwise is not written."""

    def write(fields: Fields) -> Config:
        if field in fields and fields[field] != value:
            raise Inexpressible(field, fields[field])
        return {}

    return custom((), (field,), read=lambda config: {field: value} if when(config) else {}, write=write)


def keeps(config: Config, key: str) -> Mapping[str, str]:
    """A stand-in without a remark: the key moves no memory, and is written back as it was read."""
    return {key: ""} if config.get(key) is not None else {}


def under(prefix: str, rule: Rule) -> Rule:
    """The rule for the same keys one level down (`arguments.`)."""

    def inner(config: Config) -> Config:
        return {key[len(prefix) :]: value for key, value in config.items() if key.startswith(prefix)}

    def outer(config: Mapping[str, Any]) -> dict[str, Any]:
        return {prefix + key: value for key, value in config.items()}

    return Rule(
        keys=tuple(prefix + key for key in rule.keys),
        fields=rule.fields,
        read=lambda config: rule.read(inner(config)),
        write=lambda fields: outer(rule.write(fields)),
        defaults=lambda config: rule.defaults(inner(config)),
        stand_ins=lambda config: outer(rule.stand_ins(inner(config))),
    )


def always(field: str, value: Any) -> Rule:
    """What the trainer does whatever its config says: read into every job, written nowhere."""
    return custom((), (field,), read=lambda _: {}, write=lambda _: {}, defaults={field: value})


def written(key: str, value: Any) -> Rule:
    """A key written so that the trainer does what was priced; any other value of it, read, is named as unpriced."""
    return custom((), (), read=lambda _: {}, write=lambda _: {key: value})


def flatten(config: Mapping[str, Any], prefix: str = "", *, whole: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Nested mappings as dotted paths. Lists, empty mappings, the mappings named in `whole` and those whose keys are
    not plain names are values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and path not in whole and all(map(_is_name, value)):
            flat.update(flatten(value, path + ".", whole=whole))
        else:
            flat[path] = value
    return flat


def _is_name(key: object) -> bool:
    return isinstance(key, str) and "." not in key


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths as nested mappings: `flatten` undone."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *above, last = path.split(".")
        place = nested
        for name in above:
            place = place.setdefault(name, {})
        place[last] = value
    return nested


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
