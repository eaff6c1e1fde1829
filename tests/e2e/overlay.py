"""What a run on a tiny CPU model may change of a written file, and the proof that it changed nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peftplan.trainers.rules import flatten, nest


def overlaid(written: Mapping[str, Any], changes: Mapping[str, Any], *, may: Iterable[str]) -> dict[str, Any]:
    """`written` with the flat keys of `changes` set (None takes the key away), all of them declared in `may`."""
    flat = {**flatten(written), **changes}
    proof = nest({key: value for key, value in flat.items() if not (key in changes and value is None)})
    assert differing(written, proof) <= set(may), differing(written, proof) - set(may)
    return proof


def differing(written: Mapping[str, Any], proof: Mapping[str, Any]) -> set[str]:
    """Dotted keys that are not the same in both."""
    one, other = flatten(written), flatten(proof)
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
