"""From what a user names as a model to its Arch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from peftplan.arch import catalog
from peftplan.arch.catalog import ModelEntry
from peftplan.arch.checks import has_code, refuse_unmodelled, remarks
from peftplan.arch.config import Config, printable, show
from peftplan.arch.core import Arch
from peftplan.arch.families import Family, families
from peftplan.arch.files import find_config, read_config
from peftplan.arch.hub import fetch_config, is_hub_id
from peftplan.arch.overrides import override
from peftplan.errors import RequestError

TRACE_HINT = "`peftplan profile --device meta` can trace any transformers model"


def load_arch(
    model: str,
    *,
    config: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Arch:
    """The Arch of `model`: the first that applies of `config` (then `model` is only its label), a folder or
    config.json, a catalog name, a Hub id `owner/name` or `owner/name@revision`.

    `overrides` replaces keys of the config (`{"num_hidden_layers": 2}`; a dot reaches into an object).
    Only config.json is read and nothing in it is executed. Raises UnknownName, BadFile, Unsupported or
    RequestError in one line, and OutsideError where the Hub does not answer.
    """
    if config is not None:
        given = Config(values=_plain(config), name=model, label=f"config of {printable(model)}")
        return _read(given, overrides or {})
    _refuse_name(model)
    path = find_config(model)
    if path is not None:
        return _read(Config(values=read_config(path, label=model), name=model, label=model), overrides or {})
    entry = catalog.lookup(model)
    if entry is not None:
        return _read(_from_catalog(model, entry), overrides) if overrides else _catalog_arch(model)
    if is_hub_id(model):
        return _read(_from_hub(model), overrides or {})
    raise catalog.unknown(model)


@lru_cache(maxsize=256)
def _catalog_arch(model: str) -> Arch:
    """What a catalog name stands for: the catalog does not change while the process runs."""
    return _read(_from_catalog(model, catalog.find_model(model)), {})


def _read(found: Config, overrides: Mapping[str, Any]) -> Arch:
    family = _family(found)
    changed = replace(found, values=override(found.values, overrides, family=family))
    refuse_unmodelled(changed)
    return _family(changed).read(replace(changed, notes=(*changed.notes, *remarks(changed))))


def _refuse_name(model: str) -> None:
    if not model.strip():
        raise RequestError("no model given; name one, such as llama-7b (`peftplan list models` shows all)")
    if printable(model) != model:
        raise RequestError(f"{show(model)} is not the name of a model, a folder or a config.json")


def _plain(config: object) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise RequestError(f"a config must be an object of config.json's keys, not {type(config).__name__}")
    return dict(config)


def _from_catalog(model: str, entry: ModelEntry) -> Config:
    values = {**entry.config, "dtype": entry.dtype}
    notes = (_stand_in(model, entry), entry.caveat)
    return Config(values=values, name=entry.id, label=model, notes=tuple(note for note in notes if note))


def _stand_in(model: str, entry: ModelEntry) -> str | None:
    if catalog.spelling(model) in map(catalog.spelling, entry.own_names):
        return None
    return f"{model} has the sizes of {entry.id}, which is taken with its dtype, {entry.dtype}"


def _from_hub(model: str) -> Config:
    path = fetch_config(model)
    note = f"config.json of {model} from the Hugging Face Hub, commit {path.parent.name}"
    return Config(values=read_config(path, label=model), name=model, label=model, notes=(note,))


def _family(config: Config) -> Family:
    model_type = config.values.get("model_type")
    if not isinstance(model_type, str):
        raise config.wrong(_no_model_type(config))
    known = families()
    if model_type not in known:
        raise config.unsupported(_not_modelled(config, model_type))
    return known[model_type]


def _no_model_type(config: Config) -> str:
    if "peft_type" in config.values:
        return "this is a PEFT adapter's config; give the base model, and this file as --adapter-config"
    if "model_type" in config.values:
        return f"model_type must be a string, not {show(config.values['model_type'])}"
    return f"model_type is missing; use one of {', '.join(families())}"


def _not_modelled(config: Config, model_type: str) -> str:
    kind = "a multi-modal model, " if isinstance(config.values.get("text_config"), dict) else ""
    code = "; its config names code of its own (auto_map), which is never run" if has_code(config) else ""
    return (
        f"model_type {show(model_type)} is {kind}not modelled yet{code}; "
        f"modelled: {', '.join(families())}; {TRACE_HINT}"
    )
