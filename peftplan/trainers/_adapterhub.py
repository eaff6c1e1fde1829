"""Methods of `adapters` itself between its configs and a job: the knobs are the config's own keys.

Beside what is written, a config of the library's holds only what moves no memory, from the one that `base` names.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from peftplan import methods
from peftplan.errors import RequestError
from peftplan.trainers.rules import Config, Fields

ADAPTER, FUSION = "adapter_config.", "fusion."
ADAPTERS = "fusion.adapters"
"""The folders of the adapters that are fused."""
PARTS = ("prefix_tuning", "adapter", "lora")
"""What unions call their parts, in the order of their configs."""
WHOLE = frozenset(ADAPTER + name for name in ("reduction_factor", *PARTS))


def names() -> tuple[str, ...]:
    """Every such method."""
    return tuple(name for name in methods.names() if methods.adapterhub(name) is not None)


def fields() -> tuple[str, ...]:
    """What a job says of them."""
    known = {knob for name in names() for knobs in methods.settings_of(name) for knob in knobs}
    return ("variant", *(f"method.{knob}" for knob in sorted(known)))


def read(config: Config) -> Fields:
    """The method and its knobs where they are not its defaults."""
    asked = config["adapter"]
    name, implied = methods.resolve_name(asked)
    cls = methods.get(name)
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    said = {key.partition(".")[2]: value for key, value in config.items() if key.startswith((ADAPTER, FUSION))}
    if "adapters" in said:
        said["num_adapters"] = _count(said.pop("adapters"))
    rank = {"rank": said.pop("r")} if "r" in defaults else {}
    moved = _parts_moved(name, said) if issubclass(cls, methods.AdapterHub) and cls.parts else _moved(said, defaults)
    alias = {"variant": asked} if asked != name and not implied else {}
    return {"method": name, **alias, **rank, **{f"method.{knob}": value for knob, value in moved.items()}}


def write(given: Fields, cls: type[methods.AdapterHub]) -> Config:
    """Every knob of the method, and the settings besides that the job names."""
    knobs = {key.partition(".")[2]: value for key, value in given.items() if key.startswith("method.")}
    if cls.parts:
        written = _parts_written(given["method"], knobs)
        return {"adapter": given["method"], "base": cls.base_config, **{ADAPTER + k: v for k, v in written.items()}}
    made = methods.make(given["method"], knobs)
    held = _held(made)
    if "r" in held:
        held["r"] = given["rank"]
    every = {**{knob: value for knob, value in knobs.items() if knob not in held}, **held}
    count = every.pop("num_adapters", None)
    written = {(FUSION if knob in cls.fused else ADAPTER) + knob: _as_written(v) for knob, v in every.items()}
    folders = {} if count is None else {ADAPTERS: [f"adapter_{i}" for i in range(count)]}
    return {"adapter": given.get("variant", given["method"]), "base": cls.base_config, **written, **folders}


def _held(made: methods.Method) -> dict[str, Any]:
    return {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}


def _moved(said: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {knob: value for knob, value in said.items() if _as_held(value) != defaults.get(knob)}


def _parts(name: str, knobs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every knob of every part of a union."""
    made = methods.make(name, knobs)
    assert isinstance(made, methods.AdapterHub)
    return {part: _held(member) for part, member in zip(made.parts, made.members(), strict=True)}


def _parts_moved(name: str, said: dict[str, Any]) -> dict[str, Any]:
    """What is said of each part where it is not what the union has it for."""
    moved = {part: _moved(said.get(part, {}), held) for part, held in _parts(name, {}).items()}
    return {part: knobs for part, knobs in moved.items() if knobs}


def _parts_written(name: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """Every knob of each part, and the settings besides that the job names."""
    every = {part: {**(knobs.get(part) or {}), **held} for part, held in _parts(name, knobs).items()}
    return {part: {knob: _as_written(value) for knob, value in held.items()} for part, held in every.items()}


def _count(folders: object) -> int:
    if not isinstance(folders, (list, tuple)):
        raise RequestError(f"{ADAPTERS}: give a list of folders, not {folders!r}")
    return len(folders)


def _as_held(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_written(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
