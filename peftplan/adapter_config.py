"""PEFT's adapter_config.json as the fields of a Job: its method and every knob, under PEFT's own names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftplan import datafile, methods
from peftplan.errors import BadFile, Unsupported
from peftplan.job import Assumption

_OPTIONS = {"r": "rank", "target_modules": "target_modules"}
"""Knobs that are fields of a job."""
_INERT: tuple[Any, ...] = (None, False, {}, [], "")


def read(path: Path) -> dict[str, Any]:
    """Job fields (`method`, `rank`, `target_modules`, `set`, `model`, `remarks`) from a config or its folder.

    A knob that the method does not know and that is off is dropped; one that is on is named in `remarks`, since it
    could move memory. Raises BadFile and Unsupported.
    """
    file = path / "adapter_config.json" if path.is_dir() else path
    data = datafile.load(file)
    if not isinstance(data, dict) or not isinstance(data.get("peft_type"), str):
        raise BadFile(f"{file}: not a PEFT adapter_config.json: no peft_type in it")
    method = _method(file, data["peft_type"])
    modelled, harmless = methods.settings_of(method)
    knobs = {key: value for key, value in data.items() if value is not None}
    unknown = {k: v for k, v in knobs.items() if k not in modelled | harmless and v not in _INERT}
    return {
        **_stated(data, method),
        "set": {f"method.{k}": v for k, v in knobs.items() if k in modelled and not _is_option(k, v)},
        "remarks": [_remark(key, value, method) for key, value in unknown.items()],
    }


def _method(file: Path, peft_type: str) -> str:
    name = peft_type.lower()
    if name in methods.UNMODELLED:
        raise Unsupported(f"{file}: peft_type {peft_type} is not modelled: {methods.UNMODELLED[name]}")
    if name not in methods.names() and name not in methods.aliases():
        known = ", ".join(methods.names())
        raise Unsupported(f"{file}: peft_type {peft_type} is not modelled yet; modelled: {known}")
    return name


def _stated(data: Mapping[str, Any], method: str) -> dict[str, Any]:
    found = {field: data[knob] for knob, field in _OPTIONS.items() if _is_option(knob, data.get(knob))}
    model = data.get("base_model_name_or_path")
    return {"method": method, **found, **({"model": model} if model else {})}


def _is_option(knob: str, value: Any) -> bool:
    """Whether the knob goes into the job's own field; a rank of 0, which OFT writes for `not given`, does not."""
    return knob in _OPTIONS and bool(value)


def _remark(key: str, value: Any, method: str) -> Assumption:
    why = f"not a setting of {method} that is priced; it could move memory either way"
    return Assumption(what=f"method.{key}", value=value, why=why)
