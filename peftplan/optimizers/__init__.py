"""Optimizers: `get("adamw")` is the file `adamw.py`; `names()` is the folder; other spellings are rows in a file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from peftplan import plugins
from peftplan.optimizers.base import Optimizer

__all__ = ["Optimizer", "aliases", "get", "make", "names"]


def names() -> tuple[str, ...]:
    return plugins.names(__name__)


@lru_cache
def aliases() -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in names():
        for alias, settings in getattr(plugins.load(__name__, "optimizer", name), "VARIANTS", {}).items():
            found[alias] = (name, settings)
    return found


def resolve_name(name: str) -> tuple[str, dict[str, Any]]:
    key = plugins.canonical(name)
    if key in names():
        return key, {}
    known = aliases()
    if key in known:
        return known[key]
    plugins.load(__name__, "optimizer", key, known=tuple(known))
    raise AssertionError


def get(name: str) -> type[Optimizer]:
    cls: type[Optimizer] = plugins.load(__name__, "optimizer", resolve_name(name)[0]).OPTIMIZER
    return cls


def make(name: str, knobs: Mapping[str, Any]) -> Optimizer:
    key, implied = resolve_name(name)
    made: Optimizer = plugins.configure(
        plugins.load(__name__, "optimizer", key).OPTIMIZER,
        {**implied, **knobs},
        what=f"optimizer {name}",
        harmless=frozenset({"lr", "betas", "eps", "weight_decay", "momentum_decay"}),
    )
    return made
