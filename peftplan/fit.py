"""Whether it fits: bytes on the device against what a process can use of a card."""

from __future__ import annotations

from peftplan.calibration import calibration
from peftplan.hardware.common import common_gpus
from peftplan.hardware.gpus import Gpu, usable_bytes
from peftplan.job import Assumption
from peftplan.result import Fit, Verdict


def judge_fit(gpu: Gpu | None, device_bytes: int | None, *, packed: bool) -> Fit:
    """The verdict for one card; null where no card is named or a size is unknown (`fit_reasons` says which).

    `packed`: whether the frozen weights are quantized, by which measured runs are compared.
    """
    usable = usable_bytes(gpu).bytes if gpu is not None else None
    if gpu is None or usable is None or device_bytes is None:
        return Fit.unknown(gpu.name if gpu is not None else None).model_copy(update={"usable_bytes": usable})
    known = calibration(packed=packed)
    low, high = known.interval(device_bytes)
    return Fit(
        gpu=gpu.name,
        usable_bytes=usable,
        headroom_bytes=usable - device_bytes,
        verdict=verdict_of(device_bytes, usable, margin=known.margin),
        margin=known.margin,
        probability=known.probability(device_bytes, usable),
        low_bytes=low,
        high_bytes=high,
        confidence=known.says,
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


def verdict_of(needed: int, usable: int, *, margin: float) -> Verdict:
    """Of `needed` bytes on a card where a process can use `usable`: `fits` leaves `margin` times the need free."""
    if needed > usable:
        return "does_not_fit"
    return "tight" if usable - needed < margin * needed else "fits"


def smallest_gpus(device_bytes: int, *, count: int = 3) -> tuple[str, ...]:
    """Short names of the smallest common cards that hold `device_bytes`, smallest first; empty where none
    does."""
    sizes = ((usable_bytes(gpu).bytes, short) for short, gpu in common_gpus().items())
    holding = sorted((size, short) for size, short in sizes if size is not None and size >= device_bytes)
    return tuple(short for _, short in holding[:count])
