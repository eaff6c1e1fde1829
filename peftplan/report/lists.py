"""What `peftplan list` knows: one plain row per name, read from the catalogs and the plug-in folders."""

from __future__ import annotations

import inspect
from typing import Any

Row = dict[str, Any]


def rows(what: str, like: str = "") -> list[Row]:
    """The rows of `models`, `gpus`, `methods`, `formats` or `optimizers` whose names hold `like`."""
    wanted = like.lower()
    return [row for row in _READERS[what]() if any(wanted in name.lower() for name in _names(row))]


def _names(row: Row) -> list[str]:
    return [row["name"], *row.get("aliases", [])]


def _models() -> list[Row]:
    from peftplan.arch.catalog import models
    from peftplan.arch.families import families

    modelled = families()
    return [
        {
            "name": model.id,
            "aliases": list(dict.fromkeys((*model.aliases, *model.same_architecture))),
            "parameters": model.params,
            "model_type": model.model_type,
            "modelled": model.model_type in modelled,
            "dtype": model.dtype,
            "license": model.license,
            "caveat": model.caveat,
        }
        for model in models()
    ]


def _gpus() -> list[Row]:
    from peftplan import hardware

    return [
        {
            "name": gpu.name,
            "aliases": list(gpu.aliases),
            "memory_bytes": gpu.memory_bytes,
            "usable_bytes": hardware.usable_bytes(gpu),
            "usd_per_hour": hardware.hourly_usd(gpu),
        }
        for gpu in hardware.gpus()
    ]


def _methods() -> list[Row]:
    from peftplan import methods

    return [{"name": name, "about": _about(methods.get(name))} for name in methods.names()]


def _formats() -> list[Row]:
    from peftplan import formats

    return [{"name": name, "about": _about(formats.get(name))} for name in formats.names()]


def _optimizers() -> list[Row]:
    from peftplan import optimizers

    return [{"name": name, "about": _about(optimizers.get(name))} for name in optimizers.names()]


def _about(plugin: object) -> str:
    """The first line of the docstring of the plug-in, or of the module that holds it."""
    text = inspect.getdoc(inspect.getmodule(plugin) or plugin) or ""
    return text.partition("\n")[0].rstrip(".")


_READERS = {
    "models": _models,
    "gpus": _gpus,
    "methods": _methods,
    "formats": _formats,
    "optimizers": _optimizers,
}
