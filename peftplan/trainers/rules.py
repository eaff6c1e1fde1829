"""Rules between a trainer's config and a job: each reads some keys into some fields, and writes them back.

Both sides are flat. A config's keys are dotted paths (`fsdp_config.offload_params`); a job's fields are its own names
and the dotted keys of its settings (`rank`, `method.lora_alpha`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peftplan.errors import RequestError

Config = Mapping[str, Any]
Fields = Mapping[str, Any]
Remarks = Mapping[str, str | None]
"""Why, by key; None where there is nothing to say but the key is to be kept."""


class Inexpressible(Exception):
    """A value of a job's field that the config has no word for."""

    def __init__(self, field: str, value: object) -> None:
        super().__init__(f"{field}={value}")
        self.field, self.value = field, value


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`read` sees the whole flat config and answers the fields it decides; `write` sees all fields and answers keys.

    `keys` are those it claims: no other rule reads them, and they are not kept apart. `fields` are those it speaks for:
    a job that says something of a field no rule speaks for cannot be written. `defaults` are what the trainer does
    where the config is silent.
    """

    keys: tuple[str, ...]
    fields: tuple[str, ...]
    read: Callable[[Config], Fields]
    write: Callable[[Fields], Config]
    defaults: Fields
    stand_ins: Callable[[Config], Remarks]
    """What `read` prices as something else: which way that errs, by key. A key that the config holds is kept beside the
    job and written back as long as the job says what it was read as."""


def _nothing(_: Config) -> Remarks:
    return {}


def custom(
    keys: tuple[str, ...],
    fields: tuple[str, ...],
    *,
    read: Callable[[Config], Fields],
    write: Callable[[Fields], Config],
    defaults: Fields | None = None,
    stand_ins: Callable[[Config], Remarks] = _nothing,
) -> Rule:
    """A rule with code of its own: several keys say one thing, or one key several."""
    return Rule(keys=keys, fields=fields, read=read, write=write, defaults=defaults or {}, stand_ins=stand_ins)


def same(key: str, field: str, *, default: Any = None) -> Rule:
    """The key's value is the field's."""
    return custom(
        (key,),
        (field,),
        read=lambda config: {field: config[key]} if config.get(key) is not None else {},
        write=lambda fields: {key: _listed(fields[field])} if fields.get(field) is not None else {},
        defaults={} if default is None else {field: default},
    )


def words(
    key: str,
    field: str,
    meaning: Mapping[Any, Any],
    *,
    default: Any = None,
    stands_in: Mapping[Any, tuple[Any, str]] | None = None,
) -> Rule:
    """Each of the key's values stands for one of the field's; where two mean the same, the first one is written.

    `stands_in` are words for what peftplan does not model: (the nearest value that it does, why and which way it errs).
    """
    spoken: dict[Any, Any] = {}
    for word, value in meaning.items():
        spoken.setdefault(value, word)
    nearest = stands_in or {}

    def read(config: Config) -> Fields:
        word = config.get(key)
        if word is None:
            return {}
        if word in nearest:
            return {field: nearest[word][0]}
        if word not in meaning:
            raise RequestError(f"{key}: {word!r} is not read; known: {', '.join(map(str, [*meaning, *nearest]))}")
        return {field: meaning[word]}

    def stand_ins(config: Config) -> Remarks:
        word = config.get(key)
        return {key: nearest[word][1]} if word in nearest else {}

    def write(fields: Fields) -> Config:
        value = fields.get(field)
        if value is None:
            return {}
        if value not in spoken:
            raise Inexpressible(field, value)
        return {key: spoken[value]}

    defaults = {} if default is None else {field: default}
    return custom((key,), (field,), read=read, write=write, defaults=defaults, stand_ins=stand_ins)


def always(field: str, value: Any) -> Rule:
    """What the trainer does whatever its config says: read into every job, written nowhere."""
    return custom((), (field,), read=lambda _: {}, write=lambda _: {}, defaults={field: value})


def written(key: str, value: Any) -> Rule:
    """A key written so that the trainer does what was priced; any other value of it, read, is named as unpriced."""
    return custom((), (), read=lambda _: {}, write=lambda _: {key: value})


def flatten(
    config: Mapping[str, Any], prefix: str = "", *, whole: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Nested mappings as dotted paths. Lists, the mappings named in `whole` and those whose keys are not plain names
    are values."""
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
