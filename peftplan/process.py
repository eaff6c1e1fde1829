"""Settings of the process around the step, `allocator.*` and `load.*`: only a replay of the allocator reads them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from peftplan.errors import RequestError, UnknownName
from peftplan.job import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocatorKnobs:
    """How the loop treats the allocator's cache."""

    empty_cache: bool = False
    """Whether the cache is emptied before each step."""
    seq_len_before: int | None = None
    """Sequence length of the step before, where it was shorter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadKnobs:
    """How the model gets onto the device."""

    on_device: bool = False
    """Whether from_pretrained has a device_map; packed weights are always loaded onto the device."""
    warm_up: bool = True
    """Whether it first reserves the model's size (transformers since 4.50)."""
    threads: int = 0
    """How many threads load ahead while weights are packed."""
    empty_cache: bool | None = None
    """Whether the cache is emptied when the model is there: as prepare_model_for_kbit_training does since PEFT 0.20.0,
    unless told."""


def allocator_knobs(job: Job) -> AllocatorKnobs:
    """The job's `allocator.*` settings. Raises RequestError for what is wrong."""
    knobs = AllocatorKnobs(**_known(AllocatorKnobs, "allocator", job.knobs("allocator")))
    before = knobs.seq_len_before
    if before is not None and before < 1:
        raise RequestError(f"allocator.seq_len_before={before}: give the step before at least one token a sequence")
    return knobs


def load_knobs(job: Job) -> LoadKnobs:
    """The job's `load.*` settings. Raises RequestError for what is wrong."""
    knobs = LoadKnobs(**_known(LoadKnobs, "load", job.knobs("load")))
    if not 0 <= knobs.threads <= 64:
        raise RequestError(f"load.threads={knobs.threads}: give 0 (none load ahead) to 64 threads")
    return knobs


def _known(kind: type[AllocatorKnobs | LoadKnobs], prefix: str, knobs: dict[str, Any]) -> dict[str, Any]:
    """`knobs`, each of them one of `kind`'s and of its type."""
    if not knobs:
        return knobs
    numbers = {field.name for field in fields(kind) if "int" in str(field.type)}
    for key, value in knobs.items():
        if key not in {field.name for field in fields(kind)}:
            raise UnknownName(f"setting of {prefix}", key, [field.name for field in fields(kind)])
        if key in numbers and (isinstance(value, bool) or not isinstance(value, int)):
            raise RequestError(f"{prefix}.{key}={value}: give a whole number")
        if key not in numbers and not isinstance(value, bool):
            raise RequestError(f"{prefix}.{key}={value!r}: write true or false")
    return knobs
