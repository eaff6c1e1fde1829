"""Reading `--job FILE` and `--set KEY=VALUE`: plain data only, YAML 1.2 scalars, bounded size.

YAML here is what people mean: `1e-4` is a number, `no` and `1:30` are text, anchors are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peftplan.errors import BadFile, RequestError, UnknownName

MAX_JSON_BYTES = 16 * 2**20
MAX_YAML_BYTES = 2**20
"""YAML is read by pure Python at about 0.3 MB/s (measured 2026-11): a larger file belongs in JSON."""


def prefixes() -> tuple[str, ...]:
    """What the key of a setting may start with."""
    from peftplan.resolve import PREFIXES

    return PREFIXES


def read(path: Path) -> dict[str, Any]:
    """The job's fields in `path`: a Job, or an estimate's JSON, whose `job` is taken. Raises BadFile."""
    data = _parse(path, _load(path))
    if not isinstance(data, dict):
        raise BadFile(f"{path}: expected a mapping of job fields, found {_kind(data)}")
    if str(data.get("schema", "")).startswith("peftplan."):
        data = data.get("job")
        if not isinstance(data, dict):
            raise BadFile(f"{path}: this peftplan output holds no job")
    return _checked_fields(path, data)


def override(stated: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `stated`; a replaced choice takes its own knobs (`method.*`, `model.*`, ...) with it."""
    settings = dict(stated.get("set") or {})
    merged = {**stated, **given}
    for name in prefixes():
        if name in given and given[name] != stated.get(name):
            settings = {key: value for key, value in settings.items() if not key.startswith(name + ".")}
            if name == "model":
                merged.pop("config", None)
    settings.update(given.get("set") or {})
    return {**merged, "set": settings} if settings else {k: v for k, v in merged.items() if k != "set"}


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
        value = parse_yaml(text)
    except ValueError as error:
        raise RequestError(f"--set {pair!r}: cannot read the value: {error}") from None
    if isinstance(value, dict):
        raise RequestError(f"--set {pair!r}: a value is a number, a word, true, false, null or a [list]")
    return value


def parse_yaml(text: str) -> Any:
    """Plain data from YAML. Raises ValueError with one short line."""
    import yaml

    from peftplan.cli.plainyaml import PlainLoader

    try:
        return yaml.load(text, Loader=PlainLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"line {line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _load(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            raise BadFile(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB; this is not a job file")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise BadFile(f"--job {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise BadFile(f"{path}: not a text file; a job file is YAML or JSON in UTF-8") from None


def _parse(path: Path, text: str) -> Any:
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text, parse_constant=_no_constant)
        if len(text) > MAX_YAML_BYTES:
            raise ValueError(f"YAML larger than {MAX_YAML_BYTES >> 20} MiB; write it as JSON")
        return parse_yaml(text)
    except RecursionError:
        raise BadFile(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise BadFile(f"{path}: {error}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number a job can hold")


def _checked_fields(path: Path, data: dict[Any, Any]) -> dict[str, Any]:
    for key in data:
        if not isinstance(key, str):
            raise BadFile(f"{path}: the field name {key!r} is not text")
    settings = data.get("set")
    if settings is not None and not isinstance(settings, dict):
        raise BadFile(f"{path}: `set` must be a mapping such as method.lora_dropout: 0.1")
    for key in settings or {}:
        if str(key).partition(".")[0] not in prefixes():
            raise UnknownName(f"prefix in {path}: set", str(key).partition(".")[0], prefixes())
    return {key: value for key, value in data.items() if value is not None}


def _kind(data: Any) -> str:
    return "nothing" if data is None else f"a {type(data).__name__}"
