"""Bytes on the device, the verdict, the smallest cards."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peftplan.calibration import calibration
from peftplan.fit import fit_reasons, judge_fit, smallest_gpus
from peftplan.hardware import find_gpu, usable_bytes
from peftplan.hardware.common import COMMON
from peftplan.hardware.overheads import cuda_context
from peftplan.job import make_job
from peftplan.pipeline import estimate, read
from peftplan.standing import has_biased_linears
from peftplan.units import GIB

T4 = find_gpu("t4")
USABLE = usable_bytes(T4).bytes or 0
MARGIN = calibration(packed=True).margin


@pytest.mark.parametrize(
    ("needed", "verdict"),
    [
        (USABLE + 1, "does_not_fit"),
        (USABLE, "tight"),
        (int(USABLE / (1 + MARGIN)) + 1, "tight"),
        (int(USABLE / (1 + MARGIN)) - 1, "fits"),
        (GIB, "fits"),
    ],
)
def test_verdicts(needed: int, verdict: str) -> None:
    fit = judge_fit(T4, needed, packed=True)
    assert (fit.verdict, fit.headroom_bytes, fit.gpu) == (verdict, USABLE - needed, "NVIDIA T4")


def test_no_verdict_without_a_reason() -> None:
    shared = find_gpu("apple-m1")
    for gpu, needed in ((None, GIB), (T4, None), (shared, GIB)):
        fit = judge_fit(gpu, needed, packed=False)
        assert fit.verdict is None
        assert fit.headroom_bytes is None
        assert [note.what for note in fit_reasons(gpu, on_device=needed is not None)] == ["fit"]


def test_the_context_comes_on_top_of_what_the_allocator_holds() -> None:
    memory = estimate(model="tinyllama-1.1b", gpu="t4", dtype="fp16", seq_len=64).memory
    assert memory.reserved_bytes is not None
    assert memory.reserved_bytes >= memory.peak_bytes
    assert memory.device_bytes == memory.reserved_bytes + cuda_context((7, 5)).bytes


def test_capabilities() -> None:
    assert T4.capability == (7, 5)
    assert replace(T4, compute_capability="12.0").capability == (12, 0)
    assert find_gpu("mi300x").capability is None
    assert find_gpu("tpu-v4").capability is None
    assert estimate(model="tinyllama-1.1b", gpu="mi300x").time.step_seconds is not None


@pytest.mark.parametrize(("model", "biased"), [("llama-7b", False), ("qwen2.5-0.5b", True)])
def test_biased_linears_are_found(model: str, biased: bool) -> None:
    assert has_biased_linears(read(make_job(model=model)).graph) is biased


def test_smallest_cards_come_first() -> None:
    assert smallest_gpus(10 * GIB)[:2] == ("RTX 3060 12GB", "T4 16GB")
    assert smallest_gpus(70 * GIB, count=9)[0] in ("A100 80GB", "H100 80GB")
    assert len(smallest_gpus(0, count=99)) == len(COMMON)
    assert smallest_gpus(10**15) == ()


def test_the_answer_carries_all_of_it() -> None:
    answer = estimate(model="llama-7b", method="qlora", gpu="rtx-4090", tokens=10**6)
    memory, fit = answer.memory, answer.fit
    assert memory.device_bytes is not None
    assert memory.device_bytes > memory.peak_bytes
    assert fit.headroom_bytes == (fit.usable_bytes or 0) - memory.device_bytes
    assert answer.cost.usd_total is not None


def test_the_cpu_backend_has_no_device() -> None:
    answer = estimate(model="tinyllama-1.1b", backend="cpu", seq_len=16)
    assert answer.memory.device_bytes is None
    assert {"memory.device_bytes", "fit", "time"} <= {a.what for a in answer.assumptions if a.value is None}
