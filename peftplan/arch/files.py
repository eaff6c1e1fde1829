"""config.json from disk: bounded, plain JSON, an object. Nothing in it is ever executed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from peftplan.errors import BadFile, Unsupported

LARGEST_BYTES = 16_000_000
"""A config.json is a few kilobytes; one with a large label map stays below a megabyte."""

_CHECKPOINTS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def find_config(model: str) -> Path | None:
    """The config file that `model` names as a path, or None where it is not one.

    A folder counts when it holds a config.json. Raises BadFile, or Unsupported for a weights file.
    """
    if _is_plain(model) and not os.path.isdir(model):
        return None
    path = _expand(model)
    ending = path.suffix.lower()
    if ending in _CHECKPOINTS:
        raise Unsupported(f"{model}: a weights file is not read; give the model's config.json or folder")
    is_path = model.startswith((".", "/", "~")) or ending == ".json"
    try:
        if path.is_dir():
            return _in_folder(model, path)
        if is_path and not path.exists():
            raise BadFile(f"{model}: no such file or folder")
        return path if is_path or ("/" in model and path.is_file()) else None
    except OSError as error:
        raise BadFile(f"{model}: cannot be read ({error.strerror})") from None


def _is_plain(model: str) -> bool:
    """Whether it can only be a name, or a folder in the working directory."""
    lower = model.lower()
    return "/" not in lower and not lower.startswith((".", "~")) and not lower.endswith((".json", *_CHECKPOINTS))


def _expand(model: str) -> Path:
    path = Path(model)
    if not model.startswith("~"):
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # ~nobody
        return path


def _in_folder(model: str, folder: Path) -> Path | None:
    config = folder / "config.json"
    if config.exists():
        return config
    if (folder / "adapter_config.json").exists():
        raise BadFile(f"{model}: holds a PEFT adapter but no config.json; give its base model")
    if folder.name != model:
        raise BadFile(f"{model}: the folder has no config.json")
    return None


def read_config(path: Path, *, label: str) -> dict[str, Any]:
    """The object in the JSON file `path`. Raises BadFile with `label` in the line."""
    text = _decode(_read_bytes(path, label=label), label=label)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise BadFile(f"{label}: nested too deeply for a config") from None
    except ValueError as error:
        raise BadFile(f"{label}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadFile(f"{label}: holds a JSON {type(value).__name__}, not an object with a model's config")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _read_bytes(path: Path, *, label: str) -> bytes:
    try:
        if not path.is_file():
            raise BadFile(f"{label}: not a file")
        with path.open("rb") as file:
            data = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise BadFile(f"{label}: cannot be read ({error.strerror})") from None
    if len(data) > LARGEST_BYTES:
        raise BadFile(f"{label}: larger than {LARGEST_BYTES // 10**6} MB, so not a model's config.json")
    return data


def _decode(data: bytes, *, label: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadFile(f"{label}: not a UTF-8 text file, so not JSON") from None
