"""Whether it fits: bytes on the device against what a process can use of a card."""

from __future__ import annotations

from dataclasses import dataclass

from peftplan.hardware.common import common_gpus
from peftplan.hardware.gpus import Gpu, usable_bytes
from peftplan.result import Assumption, Fit, Verdict

MARGIN = 0.12
"""Headroom below this fraction of the needed bytes is `tight`. Near a full card the same QLoRA run reserved
12,021 MiB once and 13,413 MiB again, 11.6 % more (fitcheck-llm 0.3.1, Qwen2.5-7B on T4, 2026-09). To be
replaced by the errors of `device` predictions over the records in profiles/."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A Fit and the reasons for what it leaves open."""

    fit: Fit
    notes: tuple[Assumption, ...] = ()


def judge_fit(gpu: Gpu | None, *, device_bytes: int | None, reserved_known: bool) -> Judged:
    """The verdict for one card; None with a reason where no card is named or a size is unknown."""
    if gpu is None:
        return _open(None, None, "no GPU named; give --gpu")
    usable = usable_bytes(gpu)
    if usable.bytes is None:
        return _open(gpu, None, usable.source)
    if device_bytes is None:
        return _open(gpu, usable.bytes, "the bytes on the device are unknown")
    return Judged(
        fit=Fit(
            gpu=gpu.name,
            usable_bytes=usable.bytes,
            headroom_bytes=usable.bytes - device_bytes,
            verdict=_verdict(device_bytes, usable.bytes),
            confidence=_confidence(reserved_known=reserved_known),
        )
    )


def _open(gpu: Gpu | None, usable: int | None, why: str) -> Judged:
    fit = Fit(
        gpu=gpu.name if gpu is not None else None,
        usable_bytes=usable,
        headroom_bytes=None,
        verdict=None,
        confidence=None,
    )
    return Judged(fit=fit, notes=(Assumption(what="fit", value=None, why=why),))


def _verdict(needed: int, usable: int) -> Verdict:
    if needed > usable:
        return "does_not_fit"
    return "tight" if usable - needed < MARGIN * needed else "fits"


def _confidence(*, reserved_known: bool) -> str:
    if reserved_known:
        return "reserved bytes modelled; context measured or recalled"
    return "allocated bytes only: fragmentation is left to the margin"


def smallest_gpus(device_bytes: int, *, count: int = 3) -> tuple[str, ...]:
    """Short names of the smallest common cards that hold `device_bytes`, smallest first; empty where none
    does."""
    sizes = ((usable_bytes(gpu).bytes, short) for short, gpu in common_gpus().items())
    holding = sorted((size, short) for size, short in sizes if size is not None and size >= device_bytes)
    return tuple(short for _, short in holding[:count])
