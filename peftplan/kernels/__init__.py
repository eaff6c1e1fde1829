"""Whose kernels run: `get("liger")` is the file `liger.py`; `names()` is the folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftplan import plugins
from peftplan.errors import UnknownName
from peftplan.graph.blocks.kernels import Asked, Kernels

__all__ = ["Asked", "Kernels", "canonical", "get", "make", "names"]

_SPELLINGS = {"transformers": "hf", "none": "hf", "liger_kernel": "liger", "fms": "foak"}


def names() -> tuple[str, ...]:
    return plugins.names(__name__)


def canonical(name: str) -> str:
    """The file name of a set of kernels, from any spelling of it."""
    key = plugins.canonical(name)
    return _SPELLINGS.get(key, key)


def get(name: str) -> type[Kernels]:
    key = canonical(name)
    if key not in names():
        raise UnknownName("kernels", name, names())
    cls: type[Kernels] = plugins.load(__name__, "kernels", key).KERNELS
    return cls


def make(name: str, knobs: Mapping[str, Any]) -> Kernels:
    """Kernels with their settings; raises RequestError for settings they do not have."""
    made: Kernels = plugins.configure(get(name), knobs, what=f"kernels {name}")
    return made
