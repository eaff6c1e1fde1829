"""What `--job FILE` and `--set KEY=VALUE` say, as fields of a Job."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peftplan import datafile
from peftplan.errors import RequestError, UnknownName


def prefixes() -> tuple[str, ...]:
    """What the key of a setting may start with."""
    from peftplan.resolve import PREFIXES

    return PREFIXES


def read(path: Path) -> dict[str, Any]:
    """The job's fields in `path`: a Job, or an estimate's JSON, whose `job` is taken. Raises BadFile."""
    from peftplan import questions

    return questions.fields(path)


def read_trainer(paths: Sequence[Path]) -> dict[str, Any]:
    """The job's fields that a trainer's config, with files beside it, states. Raises BadFile and RequestError."""
    from peftplan.trainers import read_configs

    return read_configs(paths).model_dump(exclude_defaults=True, by_alias=True)


def read_adapter(path: Path) -> dict[str, Any]:
    """The job's fields that PEFT's own config states. Raises BadFile and Unsupported."""
    from peftplan import adapter_config

    return adapter_config.read(path)


def override(stated: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `stated`.

    A replaced choice takes its own knobs (`method.*`, `model.*`, ...) and what was remarked about it with it.
    """
    settings = dict(stated.get("set") or {})
    merged = {**stated, **given}
    merged = {**merged, "remarks": _remarks(stated, given)} if "remarks" in merged else merged
    _drop_shape(merged, stated, given)
    for name in prefixes():
        if name in given and given[name] != stated.get(name):
            settings = {key: value for key, value in settings.items() if not key.startswith(name + ".")}
            if name == "model":
                merged.pop("config", None)
    settings.update(given.get("set") or {})
    return {**merged, "set": settings} if settings else {k: v for k, v in merged.items() if k != "set"}


def _remarks(stated: dict[str, Any], given: dict[str, Any]) -> list[Any]:
    replaced = {*given, *(given.get("set") or {})}
    kept = [remark for remark in stated.get("remarks") or () if dict(remark)["what"] not in replaced]
    return [*kept, *(given.get("remarks") or ())]


def _drop_shape(merged: dict[str, Any], stated: dict[str, Any], given: dict[str, Any]) -> None:
    """Rank and targets of the method that was replaced, where the new one has none."""
    from peftplan import methods

    if "method" not in given or given["method"] == stated.get("method"):
        return
    knobs, _ = methods.settings_of(given["method"])
    for field, knob in (("rank", "r"), ("target_modules", "target_modules")):
        if knob not in knobs and field not in given:
            merged.pop(field, None)


def assignments(pairs: Iterable[str]) -> dict[str, Any]:
    """`["method.lora_dropout=0.1", ...]` as a mapping of typed values. Raises RequestError."""
    return dict(_assignment(pair) for pair in pairs)


def _assignment(pair: str) -> tuple[str, Any]:
    key, equals, text = pair.partition("=")
    prefix, dot, name = key.strip().partition(".")
    if not equals or not dot or not name:
        raise RequestError(f"--set {pair!r}: write it like method.lora_dropout=0.1")
    if prefix not in prefixes():
        raise UnknownName("--set prefix", prefix, prefixes())
    return f"{prefix}.{name}", _value(pair, text)


def _value(pair: str, text: str) -> Any:
    try:
        value = datafile.plain(text)
    except ValueError as error:
        raise RequestError(f"--set {pair!r}: cannot read the value: {error}") from None
    if isinstance(value, dict):
        raise RequestError(f"--set {pair!r}: a value is a number, a word, true, false, null or a [list]")
    return value
