"""Fine-tuning methods: `get("lora")` is the file `lora.py`; `names()` is the folder; variants are rows in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peftplan import plugins
from peftplan.errors import Unsupported
from peftplan.methods._adapterhub import AdapterHub
from peftplan.methods._unmodelled import NO_METHOD, OF_PAPERS, UNMODELLED
from peftplan.methods.base import Host, Method

__all__ = [
    "UNMODELLED",
    "AdapterHub",
    "Host",
    "Method",
    "adapterhub",
    "aliases",
    "get",
    "make",
    "names",
    "optimizer_of",
    "packages_of",
    "resolve_name",
    "settings_of",
]


def names() -> tuple[str, ...]:
    return plugins.names(__name__)


def aliases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every name that is a variant of a method: name -> (method, settings it implies)."""
    return plugins.aliases(__name__, "method")


def resolve_name(name: str) -> tuple[str, dict[str, Any]]:
    """(method file, implied settings) of a method or variant name.

    Raises Unsupported for a method of PEFT's that is not modelled, with the reason, and UnknownName for any other.
    """
    key = plugins.canonical(name)
    if key in UNMODELLED and key not in names():
        raise Unsupported(f"method {key} is not modelled: {UNMODELLED[key]}; `peftplan list methods` shows the others")
    if key in OF_PAPERS:
        raise Unsupported(f"method {key} is not modelled: {OF_PAPERS[key]}")
    if key in NO_METHOD:
        raise Unsupported(f"{key} is no method: {NO_METHOD[key]}")
    return plugins.resolve(__name__, "method", name)


def optimizer_of(name: str) -> str | None:
    """The optimizer that a name means besides a method: `galore` is `full` with it."""
    file, _ = resolve_name(name)
    named: dict[str, str] = getattr(plugins.load(__name__, "method", file), "OPTIMIZERS", {})
    return named.get(plugins.canonical(name))


def get(name: str) -> type[Method]:
    """The method class a name stands for."""
    cls: type[Method] = plugins.load(__name__, "method", resolve_name(name)[0]).METHOD
    return cls


def adapterhub(name: str) -> type[AdapterHub] | None:
    """The class of a method of AdapterHub's `adapters`; None for PEFT's and for names that are no method's."""
    if plugins.canonical(name) not in {*names(), *aliases()}:
        return None
    found = get(name)
    return found if issubclass(found, AdapterHub) else None


def settings_of(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """(settings that move memory, settings the libraries have besides) of a method."""
    module = plugins.load(__name__, "method", resolve_name(name)[0])
    modelled = frozenset(field.name for field in dataclasses.fields(module.METHOD))
    return modelled, getattr(module, "HARMLESS", frozenset())


def packages_of(name: str) -> tuple[str, ...]:
    """What the libraries import for a method without requiring it themselves."""
    packages: tuple[str, ...] = getattr(plugins.load(__name__, "method", resolve_name(name)[0]), "PACKAGES", ())
    return packages


def example(name: str) -> dict[str, Any]:
    """The settings of a method's first example that are not its defaults."""
    module = plugins.load(__name__, "method", resolve_name(name)[0])
    first = module.EXAMPLES[0]
    return {f.name: value for f in dataclasses.fields(first) if (value := getattr(first, f.name)) != f.default}


def make(name: str, knobs: Mapping[str, Any]) -> Method:
    """A method with its settings; raises RequestError for settings it does not have."""
    key, implied = resolve_name(name)
    module = plugins.load(__name__, "method", key)
    made: Method = plugins.configure(
        module.METHOD, {**implied, **knobs}, what=f"method {name}", harmless=getattr(module, "HARMLESS", frozenset())
    )
    return made
