"""Recompute policies: `get("full")` is the file `full.py`; `names()` is the folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftplan import plugins
from peftplan.errors import RequestError, UnknownName
from peftplan.recompute.base import Checkpoint, Recompute

__all__ = ["Checkpoint", "Recompute", "get", "make", "names"]


def names() -> tuple[str, ...]:
    return plugins.names(__name__)


def get(name: str) -> type[Recompute]:
    key = plugins.canonical(name)
    if key not in names():
        raise UnknownName("recompute policy", name, names())
    cls: type[Recompute] = plugins.load(__name__, "recompute", key).RECOMPUTE
    return cls


def make(name: str, knobs: Mapping[str, Any], *, offload: str | None = None) -> Recompute:
    """A policy with its settings, under what --offload says; raises RequestError for settings it does not have, or its
    library refuses."""
    for key in ("use_reentrant", "offload"):
        if not isinstance(knobs.get(key, False), bool):
            raise RequestError(f"recompute.{key}={knobs[key]!r}: write true or false")
    if "activations" in (offload or "").split("+"):
        knobs = {**knobs, "offload": True}
    made = plugins.configure(get(name), knobs, what=f"recompute {name}")
    refused = made.refusal()
    if refused is not None:
        raise RequestError(refused)
    return made
