"""Settings of the process around the step, `allocator.*` and `load.*`: only a replay of the allocator reads them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from peftplan.errors import RequestError, UnknownName
from peftplan.job import Job
from peftplan.step.allocator import LARGE_SEGMENT_BYTES
from peftplan.units import MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocatorKnobs:
    """How the loop treats the allocator's cache."""

    empty_cache: bool = False
    """Whether the cache is emptied before each step."""
    seq_len_before: int | None = None
    """Sequence length of the step before, where it was shorter."""
    expandable_segments: bool = False
    """The rest are settings of PYTORCH_CUDA_ALLOC_CONF under their own names; the defaults are torch's."""
    max_split_size_mb: int | None = None
    garbage_collection_threshold: float | None = None
    """Does nothing without `memory_fraction`."""
    roundup_power2_divisions: int | None = None
    memory_fraction: float | None = None
    """Share of the card that the allocator may reserve (torch.cuda.set_per_process_memory_fraction)."""


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
    _check_conf(knobs)
    return knobs


def _check_conf(knobs: AllocatorKnobs) -> None:
    """As AcceleratorAllocatorConfig refuses settings (c10/core/AllocatorConfig.cpp)."""
    split, threshold, divisions = (
        knobs.max_split_size_mb,
        knobs.garbage_collection_threshold,
        knobs.roundup_power2_divisions,
    )
    if split is not None and split <= LARGE_SEGMENT_BYTES // MIB:
        raise RequestError(f"allocator.max_split_size_mb={split}: torch takes more than 20 (its large segments)")
    if threshold is not None and not 0 < threshold < 1:
        raise RequestError(f"allocator.garbage_collection_threshold={threshold}: give a share between 0 and 1")
    if knobs.memory_fraction is not None and not 0 < knobs.memory_fraction <= 1:
        raise RequestError(f"allocator.memory_fraction={knobs.memory_fraction}: give a share of the card up to 1")
    if divisions is not None and (divisions < 1 or divisions & (divisions - 1)):
        raise RequestError(f"allocator.roundup_power2_divisions={divisions}: torch takes powers of 2")


def allocator_conf(knobs: AllocatorKnobs) -> str:
    """PYTORCH_CUDA_ALLOC_CONF for these settings; empty where all are torch's own."""
    values = {
        "expandable_segments": knobs.expandable_segments or None,
        "max_split_size_mb": knobs.max_split_size_mb,
        "garbage_collection_threshold": knobs.garbage_collection_threshold,
        "roundup_power2_divisions": knobs.roundup_power2_divisions,
    }
    return ",".join(f"{name}:{value}" for name, value in values.items() if value is not None)


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
    shares = {field.name for field in fields(kind) if "float" in str(field.type)}
    for key, value in knobs.items():
        if key not in {field.name for field in fields(kind)}:
            raise UnknownName(f"setting of {prefix}", key, [field.name for field in fields(kind)])
        if key in numbers and (isinstance(value, bool) or not isinstance(value, int)):
            raise RequestError(f"{prefix}.{key}={value}: give a whole number")
        if key in shares and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise RequestError(f"{prefix}.{key}={value}: give a number")
        if key not in numbers | shares and not isinstance(value, bool):
            raise RequestError(f"{prefix}.{key}={value!r}: write true or false")
    return knobs
