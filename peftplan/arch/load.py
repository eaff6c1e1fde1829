"""From what a user names as a model to its Arch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peftplan.arch import catalog
from peftplan.arch.catalog import ModelEntry
from peftplan.arch.config import Config, show
from peftplan.arch.core import Arch
from peftplan.arch.families import Family, families
from peftplan.arch.files import find_config, read_config
from peftplan.arch.hub import fetch_config, is_hub_id
from peftplan.errors import RequestError, Unsupported

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
    found = _find(model, config)
    family = _family(found)
    changed = replace(found, values=_override(found.values, overrides or {}, family))
    _refuse_unmodelled(changed)
    return _family(changed).read(changed)


def _find(model: str, config: Mapping[str, Any] | None) -> Config:
    if config is not None:
        return Config(values=_plain(config), name=model, label=f"config of {model}")
    if not model.strip():
        raise RequestError("no model given; name one, such as llama-7b (`peftplan list models` shows all)")
    path = find_config(model)
    if path is not None:
        return Config(values=read_config(path, label=model), name=model, label=model)
    entry = catalog.lookup(model)
    if entry is not None:
        return _from_catalog(model, entry)
    if is_hub_id(model):
        return _from_hub(model)
    raise catalog.unknown(model)


def _plain(config: object) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise RequestError(f"a config must be an object of config.json's keys, not {type(config).__name__}")
    return dict(config)


def _from_catalog(model: str, entry: ModelEntry) -> Config:
    values = {**entry.config, "dtype": entry.dtype}
    notes = (entry.caveat,) if entry.caveat else ()
    return Config(values=values, name=entry.id, label=model, notes=notes)


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
    code = "; its config names code of its own (auto_map), which is never run" if _has_code(config) else ""
    return (
        f"model_type {model_type!r} is {kind}not modelled yet{code}; "
        f"modelled: {', '.join(families())}; {TRACE_HINT}"
    )


def _has_code(config: Config) -> bool:
    return bool(config.values.get("auto_map"))


def _override(values: Mapping[str, Any], overrides: Mapping[str, Any], family: Family) -> dict[str, Any]:
    changed = dict(values)
    for key, value in overrides.items():
        head, _, rest = key.partition(".")
        if head not in family.keys:
            raise _unknown_key(key, family)
        changed[head] = _nested(changed.get(head), rest, value) if rest else value
    if "torch_dtype" in overrides and "dtype" not in overrides:
        changed.pop("dtype", None)
    return changed


def _nested(old: object, path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    inner = dict(old) if isinstance(old, Mapping) else {}
    inner[head] = _nested(inner.get(head), rest, value) if rest else value
    return inner


def _unknown_key(key: str, family: Family) -> RequestError:
    near = difflib.get_close_matches(key, sorted(family.keys), n=3, cutoff=0.5)
    fix = f"; did you mean {' or '.join(near)}?" if near else ""
    return RequestError(f"model.{key}: {'/'.join(family.model_types)} configs have no such key{fix}")


def _refuse_unmodelled(config: Config) -> None:
    for key, why in _REFUSED.items():
        if config.values.get(key):
            raise Unsupported(f"{config.label}: {key} {show(config.values[key])} is not modelled; {why}")


_REFUSED = {
    "is_encoder_decoder": "only decoders are",
    "per_layer_config": "layers that differ by it are not",
    "output_attentions": "set it to false",
    "output_hidden_states": "set it to false",
}
