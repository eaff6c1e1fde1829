"""Finding plug-ins: a folder is the registry, one file is one member."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from peftplan.errors import RequestError, UnknownName

T = TypeVar("T")
_PRIVATE = {"base", "targets", "rules"}


@lru_cache
def names(package: str) -> tuple[str, ...]:
    """The member files of a plug-in package, sorted."""
    module = importlib.import_module(package)
    found = (info.name for info in pkgutil.iter_modules(module.__path__))
    return tuple(sorted(n for n in found if n not in _PRIVATE and not n.startswith("_")))


def unknown(package: str, what: str, name: str, known: tuple[str, ...]) -> UnknownName:
    """The error for a name that is neither a member's nor `known`."""
    return UnknownName(what, name, {*names(package), *known}, f"`peftplan list {what}s` shows all")


def load(package: str, what: str, name: str, *, known: tuple[str, ...] = ()) -> ModuleType:
    """The module of one member; UnknownName with near matches where there is none."""
    if name not in names(package):
        raise unknown(package, what, name, known)
    return importlib.import_module(f"{package}.{name}")


@lru_cache
def aliases(package: str, what: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every name that is a variant of a member: name -> (member, settings it implies)."""
    return {
        alias: (name, settings)
        for name in names(package)
        for alias, settings in getattr(load(package, what, name), "VARIANTS", {}).items()
    }


def resolve(package: str, what: str, name: str) -> tuple[str, dict[str, Any]]:
    """(member file, implied settings) of a member's or a variant's name; UnknownName otherwise."""
    key = canonical(name)
    if key in names(package):
        return key, {}
    known = aliases(package, what)
    if key not in known:
        raise unknown(package, what, key, tuple(known))
    return known[key]


@lru_cache(maxsize=1024)
def canonical(name: str) -> str:
    """`-` and `_` are the same, case does not matter."""
    return name.strip().lower().replace("-", "_")


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def configure(cls: type[T], knobs: Mapping[str, Any], *, what: str, harmless: frozenset[str] = frozenset()) -> T:
    """An instance of the frozen dataclass `cls` from user settings.

    `harmless` names settings that the libraries have and memory does not feel: accepted and dropped. Unknown names and
    wrong types are one RequestError line.
    """
    if not knobs:
        return cls()
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in knobs:
        if key not in fields and key not in harmless:
            if not fields | harmless:
                raise RequestError(f"{what} has no settings; leave {key} out")
            raise UnknownName(f"setting of {what}", key, fields | harmless)
    given = {k: v for k, v in knobs.items() if k in fields}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if isinstance(given.get(f.name), bool) and not any(word in str(f.type) for word in ("bool", "Any")):
            raise RequestError(f"{what}: {f.name}={given[f.name]}: give {f.type}, not true or false")
    if not given:
        return cls()
    try:
        made: T = _adapter(cls).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"][:1])
        raise RequestError(f"{what}: {where}={first['input']!r}: {first['msg'].lower()}") from None
    return made
