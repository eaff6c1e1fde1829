"""Optimizers: `get("adamw")` is the file `adamw.py`; `names()` is the folder; other spellings are rows in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftplan import plugins
from peftplan.optimizers.base import Optimizer

__all__ = ["HARMLESS", "Optimizer", "aliases", "get", "make", "names"]

HARMLESS = frozenset({"lr", "betas", "eps", "weight_decay", "momentum_decay"})
"""What all of them have and memory does not feel."""


def names() -> tuple[str, ...]:
    return plugins.names(__name__)


def aliases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every other spelling: name -> (optimizer, settings it implies)."""
    return plugins.aliases(__name__, "optimizer")


def resolve_name(name: str) -> tuple[str, dict[str, Any]]:
    """(optimizer file, implied settings) of any spelling; UnknownName otherwise."""
    return plugins.resolve(__name__, "optimizer", name)


def get(name: str) -> type[Optimizer]:
    cls: type[Optimizer] = plugins.load(__name__, "optimizer", resolve_name(name)[0]).OPTIMIZER
    return cls


def make(name: str, knobs: Mapping[str, Any]) -> Optimizer:
    key, implied = resolve_name(name)
    module = plugins.load(__name__, "optimizer", key)
    made: Optimizer = plugins.configure(
        module.OPTIMIZER,
        {**implied, **knobs},
        what=f"optimizer {name}",
        harmless=HARMLESS | getattr(module, "HARMLESS", frozenset()),
    )
    return made
