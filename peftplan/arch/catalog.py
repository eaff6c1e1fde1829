"""The model catalog (`models.jsonl` beside this file): configs, parameter counts, how far each was verified.

Compiled from public sources up to November 2026. `params` is the parameter count of the model class built
from `config` without weights by `params_by`; `verification` says how it compares with a published count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from peftplan.errors import UnknownName

Verification = Literal["exact", "same-shape", "explained", "exact-backbone", "mismatch", "unconfirmed"]
ConfigSource = Literal["file", "file-text-match", "count-confirmed", "class-defaults", "recalled"]

_DATA = Path(__file__).with_name("models.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """One model of the catalog."""

    id: str
    """Its Hub id."""
    aliases: tuple[str, ...]
    same_architecture: tuple[str, ...]
    """Hub ids and short names of other checkpoints with the same sizes."""
    kind: str
    config: Mapping[str, Any]
    dtype: Literal["bfloat16", "float16", "float32"]
    """What the checkpoint states."""
    license: str
    params: int
    params_by: str
    verification: Verification
    verification_note: str | None
    config_source: ConfigSource
    source: str
    notes: str | None

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that finds this entry: ids, ids without their owner, aliases."""
        return tuple(dict.fromkeys((*self.own_names, *_with_short_names(self.same_architecture))))

    @property
    def own_names(self) -> tuple[str, ...]:
        """The names of this very checkpoint."""
        return (*self.aliases, *_with_short_names((self.id,)))

    @property
    def caveat(self) -> str | None:
        """Why the config may be wrong, or None where a published parameter count confirms it."""
        if self.verification == "exact":
            return None
        origin = _ORIGINS[self.config_source]
        note = f" ({self.verification_note})" if self.verification_note else ""
        return f"catalog config of {self.id}: {origin}; {_VERDICTS[self.verification]}{note}"


def _with_short_names(ids: tuple[str, ...]) -> tuple[str, ...]:
    return (*ids, *(name.rpartition("/")[2] for name in ids))


_ORIGINS: dict[str, str] = {
    "file": "read from a published file",
    "file-text-match": "read from a published file",
    "count-confirmed": "recalled, then checked by its parameter count",
    "class-defaults": "the defaults of its class in transformers",
    "recalled": "recalled, not read from a file",
}
_VERDICTS: dict[str, str] = {
    "same-shape": "its parameter count is confirmed through another model of the same shape",
    "explained": "the published parameter count differs for a known reason",
    "exact-backbone": "the published parameter count confirms all but the head",
    "mismatch": "its parameter count differs from the published one",
    "unconfirmed": "no published parameter count confirms it",
}


@lru_cache(maxsize=1)
def models() -> Sequence[ModelEntry]:
    """Every model of the catalog, in the catalog's order."""
    with _DATA.open(encoding="utf-8") as lines:
        return tuple(_entry(json.loads(line)) for line in lines)


def _entry(row: dict[str, Any]) -> ModelEntry:
    row["aliases"] = tuple(row["aliases"])
    row["same_architecture"] = tuple(row["same_architecture"])
    return ModelEntry(**row)


def find_model(name: str) -> ModelEntry:
    """The entry that `name` (a Hub id, an alias; any case, any of - _ . between its parts) stands for.

    Raises UnknownName with the nearest names.
    """
    entry = lookup(name)
    if entry is None:
        raise unknown(name)
    return entry


def unknown(name: str) -> UnknownName:
    """The error for a name that the catalog does not hold."""
    return UnknownName("model", name, nearest(name), hint="`peftplan list models` shows all")


def nearest(name: str) -> Sequence[str]:
    """Names like `name`, best first, one for each model; every name where none is alike."""
    import difflib

    near = difflib.get_close_matches(name.lower(), _by_name(), n=20, cutoff=0.5)
    first_of_model = {_by_name()[alias].id: alias for alias in reversed(near)}
    return [alias for alias in near if alias in first_of_model.values()] or list(_by_name())


def lookup(name: str) -> ModelEntry | None:
    """Like `find_model`, with None for an unknown name."""
    return _by_name().get(name.lower()) or _by_spelling().get(spelling(name))


def hub_id(name: str) -> str:
    """The Hub id of a short name, its own where it is another checkpoint of an entry's sizes; else `name` itself."""
    entry = None if "/" in name else lookup(name)
    if entry is None:
        return name
    others = {other.rpartition("/")[2].lower(): other for other in entry.same_architecture if "/" in other}
    return others.get(name.lower(), entry.id)


@lru_cache(maxsize=1)
def _by_name() -> dict[str, ModelEntry]:
    return {name.lower(): entry for entry in models() for name in entry.names}


@lru_cache(maxsize=1)
def _by_spelling() -> dict[str, ModelEntry]:
    return {spelling(name): entry for name, entry in _by_name().items()}


def spelling(name: str) -> str:
    """`name` without case and separators, but keeping one between digits: opt-1.3b is not opt-13b."""
    marked = re.sub(r"[-_.\s]+", "-", name.lower())
    return re.sub(r"(?<!\d)-|-(?!\d)", "", marked)
