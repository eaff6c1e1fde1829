"""`--set model.KEY=VALUE`: keys of a config replaced before it is read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from peftplan.arch.config import printable
from peftplan.arch.families import Family
from peftplan.errors import RequestError


def override(values: Mapping[str, Any], overrides: Mapping[str, Any], *, family: Family) -> dict[str, Any]:
    """`values` with `overrides` in place; a dot in a key reaches into an object. RequestError for a key that
    means nothing to the family.
    """
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
    return RequestError(f"model.{printable(key)}: {'/'.join(family.model_types)} configs have no such key{fix}")
