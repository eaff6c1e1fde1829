"""What `peftplan list` knows: one plain row per name, read from the catalogs and the plug-in folders."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftplan.report.words import value_text

if TYPE_CHECKING:
    from peftplan.hardware import Gpu
    from peftplan.methods.base import Method

Row = dict[str, Any]


def rows(what: str, like: str = "") -> list[Row]:
    """The rows of one kind (`models`, `gpus`, `methods`, ...) whose names hold `like`."""
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
    from peftplan.hardware import gpus

    return [_gpu(gpu) for gpu in gpus()]


def _gpu(gpu: Gpu) -> Row:
    from peftplan.hardware import hourly_usd, usable_bytes

    usable, price = usable_bytes(gpu), hourly_usd(gpu)
    return {
        "name": gpu.name,
        "aliases": list(gpu.aliases),
        "memory_bytes": gpu.memory.marketed_bytes,
        "usable_bytes": usable.bytes,
        "usable_source": usable.source,
        "bandwidth_bytes_per_second": gpu.bandwidth_bytes_per_second,
        "dense_tflops": dict(gpu.dense_tflops),
        "usd_per_hour": price and price.usd,
        "usd_note": price and price.note,
    }


def _methods() -> list[Row]:
    from peftplan import methods, trainers

    writers = trainers.support()
    files = [_method(name, _about(methods.get(name)), methods.get(name)) for name in methods.names()]
    variants = [
        _method(
            name, f"a variant of {method}{_settings(settings)}{_with(methods.optimizer_of(name))}", methods.get(method)
        )
        for name, (method, settings) in methods.aliases().items()
    ]
    found: list[Row] = [
        {**row, "trainers": [trainer for trainer, can in writers[row["name"]].items() if can]}
        for row in (*files, *variants)
    ]
    return sorted(found, key=lambda row: str(row["name"]))


def _method(name: str, about: str, method: type[Method]) -> Row:
    text = inspect.getdoc(inspect.getmodule(method)) or ""
    return {
        "name": name,
        "about": about,
        "family": method.family,
        "libraries": list(method.libraries),
        "trains": section(text, "Trains"),
        "keeps": section(text, "Keeps for backward"),
        "not_modelled": section(text, "Not modelled"),
    }


def section(text: str, title: str) -> str | None:
    """A labelled paragraph of a docstring on one line, without its full stop."""
    found = re.search(rf"^{title}: (.*?)(?:\n\n|\n(?=[A-Z][\w ]*: )|\Z)", text, re.M | re.S)
    return " ".join(found[1].split()).rstrip(".") if found else None


def _with(optimizer: str | None) -> str:
    return f", with optimizer {optimizer}" if optimizer is not None else ""


def _settings(settings: Mapping[str, Any]) -> str:
    return "".join(f", method.{key}={value_text(value)}" for key, value in settings.items())


def _formats() -> list[Row]:
    from peftplan import formats

    return [{"name": name, "about": _about(formats.get(name))} for name in formats.names()]


def _optimizers() -> list[Row]:
    from peftplan import optimizers

    return [{"name": name, "about": _about(optimizers.get(name))} for name in optimizers.names()]


def _trainers() -> list[Row]:
    from peftplan import trainers

    return [{"name": name, "about": _about(trainers.get(name))} for name in trainers.names()]


def _launchers() -> list[Row]:
    from peftplan import launchers

    return [{"name": name, "about": _about(launchers.get(name))} for name in launchers.names()]


def _about(plugin: object) -> str:
    """The first line of the docstring of the plug-in, or of the module that holds it."""
    text = inspect.getdoc(inspect.getmodule(plugin if inspect.isclass(plugin) else type(plugin)) or plugin) or ""
    return text.partition("\n")[0].rstrip(".")


_READERS = {
    "models": _models,
    "gpus": _gpus,
    "methods": _methods,
    "formats": _formats,
    "optimizers": _optimizers,
    "trainers": _trainers,
    "launchers": _launchers,
}
