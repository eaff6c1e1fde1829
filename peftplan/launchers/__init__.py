"""Launchers: `get("slurm")` is the file `slurm.py`; `names()` is the folder; each starts a trainer's folder."""

from __future__ import annotations

from peftplan import plugins
from peftplan.launchers.base import Launcher, Place

__all__ = ["Launcher", "Place", "get", "names"]


def names() -> tuple[str, ...]:
    return plugins.names(__name__)


def get(name: str) -> Launcher:
    """The launcher of that name. Raises UnknownName."""
    launcher: Launcher = plugins.load(__name__, "launcher", plugins.canonical(name)).LAUNCHER()
    return launcher
