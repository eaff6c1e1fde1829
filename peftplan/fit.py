"""Whether it fits: bytes on the device against what a process can use of a card."""

from __future__ import annotations

from peftplan.hardware.common import common_gpus
from peftplan.hardware.gpus import Gpu, usable_bytes
from peftplan.job import Assumption
from peftplan.result import Fit, Verdict

MARGIN = 0.12
"""Headroom below this fraction of the needed bytes is `tight`. Of 60 `device` values measured for plain LoRA, QLoRA and
full fine-tuning (docs/accuracy.md, 2026-11) the prediction is short by at most 5 % in 57, by 5.3 and 8.8 % in two, and
by 14.7 % in one whose job reserved 12,021 MiB once and 13,413 MiB again, 11.6 % more: what loading left cached differed
(fitcheck-llm 0.3.1, Qwen2.5-7B on T4, 2026-09). A margin of 12 % covers all but that one, and cached memory is given
back where a card is full."""


def judge_fit(gpu: Gpu | None, device_bytes: int | None) -> Fit:
    """The verdict for one card; null where no card is named or a size is unknown (`fit_reasons` says which)."""
    usable = usable_bytes(gpu).bytes if gpu is not None else None
    if gpu is None or usable is None or device_bytes is None:
        return Fit.unknown(gpu.name if gpu is not None else None).model_copy(update={"usable_bytes": usable})
    return Fit(
        gpu=gpu.name,
        usable_bytes=usable,
        headroom_bytes=usable - device_bytes,
        verdict=verdict_of(device_bytes, usable),
        confidence="the step replayed through the allocator; the context measured or recalled",
    )


def fit_reasons(gpu: Gpu | None, *, on_device: bool) -> tuple[Assumption, ...]:
    """Why there will be no verdict, known before any byte is."""
    if gpu is None:
        why = "no GPU named; give --gpu"
    elif not on_device:
        why = "the bytes on the device are unknown"
    elif usable_bytes(gpu).bytes is None:
        why = usable_bytes(gpu).source
    else:
        return ()
    return (Assumption(what="fit", value=None, why=why),)


def verdict_of(needed: int, usable: int) -> Verdict:
    """Of `needed` bytes on a card where a process can use `usable`."""
    if needed > usable:
        return "does_not_fit"
    return "tight" if usable - needed < MARGIN * needed else "fits"


def smallest_gpus(device_bytes: int, *, count: int = 3) -> tuple[str, ...]:
    """Short names of the smallest common cards that hold `device_bytes`, smallest first; empty where none
    does."""
    sizes = ((usable_bytes(gpu).bytes, short) for short, gpu in common_gpus().items())
    holding = sorted((size, short) for size, short in sizes if size is not None and size >= device_bytes)
    return tuple(short for _, short in holding[:count])
