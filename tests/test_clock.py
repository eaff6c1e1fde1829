"""The clock against runs that others timed (`step_times.jsonl`; each row names its source)."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from peftplan.hardware import Gpu, find_gpu
from peftplan.job import make_job
from peftplan.pipeline import estimate, read
from peftplan.result import Estimate, Interval
from peftplan.step.clock import (
    OF_PEAK,
    SPREAD,
    AttentionKernel,
    OptimizerTraffic,
    StepTime,
    Unknown,
    achieved_flops,
    attention_kernel,
    cache_bytes,
    peak_flops,
    step_time,
)
from peftplan.step.segments import Segment
from peftplan.step.work import passes
from peftplan.units import DType

_RUNS = Path(__file__).with_name("step_times.jsonl")
SMALL = {"model": "tinyllama-1.1b", "micro_batch": 2, "seq_len": 256, "gpu": "a100-80gb"}


class Timed(NamedTuple):
    id: str
    half: str
    seconds: float
    told: Interval


@lru_cache(maxsize=1)
def timed() -> tuple[Timed, ...]:
    rows = [json.loads(line) for line in _RUNS.read_text("utf-8").splitlines()]
    return tuple(Timed(row["id"], row["half"], row["seconds"], _told(row["job"])) for row in rows)


def _told(job: dict[str, Any]) -> Interval:
    found = estimate(make_job(**job)).time.step_seconds
    assert found is not None
    return found


def errors(half: str) -> list[float]:
    return [run.told.expected / run.seconds - 1 for run in timed() if run.half == half]


def small(**fields: Any) -> Estimate:
    return estimate(**{**SMALL, **fields})


def seconds(answer: Estimate) -> Interval:
    assert answer.time.step_seconds is not None
    return answer.time.step_seconds


def test_every_timed_run_lies_within_its_interval() -> None:
    assert len(timed()) == 87
    assert [run.id for run in timed() if not run.told.low <= run.seconds <= run.told.high] == []


def test_the_judged_half_misses_by_what_the_answer_says() -> None:
    """Median 18 %, worst 46 % low: the words of `clock.ACCURACY`."""
    missed = errors("judge")
    assert len(missed) == 35
    assert statistics.median(map(abs, missed)) < 0.19
    assert min(missed) > -0.47
    assert max(missed) < 0.25


def test_the_fitted_half() -> None:
    missed = errors("fit")
    assert statistics.median(map(abs, missed)) < 0.08
    assert min(missed) > 1 / SPREAD - 1
    assert max(missed) < 0.35


def test_no_source_is_in_both_halves() -> None:
    sources: dict[str, set[str]] = {"fit": set(), "judge": set()}
    for line in _RUNS.read_text("utf-8").splitlines():
        row = json.loads(line)
        sources[row["half"]].add(row["source"].split("/")[0].split(":")[0])
    assert not sources["fit"] & sources["judge"]


def test_parts_sum_to_the_whole() -> None:
    answer = small(method="lora")
    parts = answer.time.breakdown
    assert parts is not None
    assert sum(parts.values()) == pytest.approx(seconds(answer).expected)
    assert (parts["communication"], parts["offload"], parts["exposed"]) == (0, 0, 0)
    assert answer.time.tokens_per_second == pytest.approx(2 * 256 / seconds(answer).expected)


def test_mfu_leaves_recomputation_out() -> None:
    answer = small(recompute="full", method="full", dtype="bf16")
    useful = answer.flops.forward + answer.flops.backward
    assert answer.time.mfu == pytest.approx(useful / seconds(answer).expected / 312e12)


def test_recomputation_takes_time() -> None:
    assert seconds(small(recompute="full")).expected > seconds(small(recompute="none")).expected


def test_a_step_is_all_its_micro_batches() -> None:
    one, four = seconds(small()), seconds(small(grad_accum=4))
    assert 3 * one.expected < four.expected < 4 * one.expected


def test_fp32_computes_at_the_rate_of_the_cuda_cores() -> None:
    """torch leaves tf32 off by default, so an A100 is 16 times slower than in bf16."""
    wide = {"seq_len": 2048, "method": "full", "batching": "exact"}
    assert seconds(small(dtype="fp32", **wide)).low > 8 * seconds(small(dtype="bf16", **wide)).low


def test_attention_in_fp32_runs_on_tensor_cores() -> None:
    """From Ampere on: three tf32 products for one in fp32, 52 TFLOP/s on an A100 whose CUDA cores do 19.5."""
    fields = {"seq_len": 2048, "method": "full", "dtype": "fp32", "batching": "padded"}
    segments = read(make_job(**{**SMALL, **fields})).step.segments
    card = find_gpu("a100-80gb")
    without = replace(card, dense_tflops={"fp32": card.dense_tflops["fp32"]})
    assert low(segments, card) < 0.95 * low(segments, without)


def test_packed_weights_pay_for_unpacking() -> None:
    """One token: no arithmetic to speak of, so what differs is the traffic of the weights."""
    one = {"micro_batch": 1, "seq_len": 8, "dtype": "bf16"}
    bf16, nf4 = (
        passes(reading.step.segments, cache_bytes=0)
        for reading in (
            read(make_job(**{**SMALL, "method": "lora", **one})),
            read(make_job(**{**SMALL, "method": "qlora", "recompute": "none", **one})),
        )
    )
    moved = [sum(k.moved_bytes * p.count for p in runs for k in p.products) for runs in (bf16, nf4)]
    assert moved[1] > 1.8 * moved[0]


def test_the_first_layer_of_lora_runs_less_backward() -> None:
    reading = read(make_job(**{**SMALL, "method": "lora"}))
    runs = passes(reading.step.segments, cache_bytes=0)
    layers = [p for p in runs if p.name == "backward" and p.count in (1, 21) and len(p.products) > 5]
    assert [p.count for p in layers] == [1, 21]
    first, rest = (sum(k.flops for k in p.products) for p in layers)
    assert 0 < first < rest


def test_flops_of_the_passes_are_those_of_the_answer() -> None:
    for fields in ({"method": "lora"}, {"method": "qlora"}, {"method": "full"}):
        reading = read(make_job(**{**SMALL, **fields}))
        runs = passes(reading.step.segments, cache_bytes=0)
        total = sum(k.flops * p.count for p in runs for k in p.products)
        assert total == reading.estimate.flops.total


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"gpu": None}, "no GPU named"),
        ({"gpu": "t4", "dtype": "bf16"}, "peak rate in bfloat16"),
        ({"gpu": "tpu-v4"}, "no GPU"),
        ({"gpu": "a100-80gb", "backend": "cpu"}, "cpu backend"),
    ],
)
def test_no_time_without_a_reason(fields: dict[str, Any], why: str) -> None:
    answer = small(**fields)
    assert answer.time.step_seconds is None
    assert answer.time.tokens_per_second is None
    assert answer.time.mfu is None
    assert answer.time.breakdown is None
    assert any(note.what == "time" and why in note.why for note in answer.assumptions)


def test_an_unmeasured_card_is_said_to_be_one() -> None:
    whats = {gpu: {a.what for a in small(gpu=gpu).assumptions} for gpu in ("rtx-4090", "h100")}
    assert "time.achieved_fraction" in whats["rtx-4090"]
    assert "time.achieved_fraction" not in whats["h100"]


def test_achieved_rates() -> None:
    a100, ada = find_gpu("a100-80gb"), find_gpu("rtx-4090")
    assert achieved_flops(a100, DType.bfloat16) == pytest.approx(0.84 * 271.2e12)
    assert achieved_flops(ada, DType.bfloat16) == pytest.approx(OF_PEAK * 165.2e12)
    assert achieved_flops(a100, DType.float32) < 10e12
    assert peak_flops(find_gpu("t4"), DType.bfloat16) is None


def test_attention_kernels() -> None:
    a100, t4 = find_gpu("a100-80gb"), find_gpu("t4")
    bf16 = DType.bfloat16
    assert attention_kernel("sdpa", masked=False, gpu=a100, compute=bf16).flash
    assert not attention_kernel("sdpa", masked=True, gpu=a100, compute=bf16).flash
    assert not attention_kernel("sdpa", masked=False, gpu=t4, compute=DType.float16).flash
    fa2 = attention_kernel("flash_attention_2", masked=True, gpu=a100, compute=DType.float32)
    assert (fa2.flash, fa2.skips_masked, fa2.half) == (True, True, bf16)


def low(segments: list[Segment], gpu: Gpu) -> float:
    found = step_time(
        passes(segments, cache_bytes=cache_bytes(gpu)),
        gpu,
        attention=AttentionKernel(flash=True, skips_masked=True),
        optimizer=OptimizerTraffic(weight_bytes=0, state_bytes=0, fused=True),
        micro_batches=1,
    )
    assert isinstance(found, StepTime)
    return found.low


def test_an_unknown_cache_keeps_everything() -> None:
    """Then `low` counts matrix products and the optimizer alone."""
    segments = read(make_job(**SMALL)).step.segments
    none, large, small_one = (replace(find_gpu("a100-80gb"), l2_bytes=size) for size in (None, 2**26, 0))
    assert low(segments, none) <= low(segments, large) < low(segments, small_one)


def test_unknown_says_why() -> None:
    found = step_time(
        passes(read(make_job(**SMALL)).step.segments),
        replace(find_gpu("a100-80gb"), dense_tflops={}),
        attention=AttentionKernel(flash=True, skips_masked=True),
        optimizer=OptimizerTraffic(weight_bytes=0, state_bytes=0, fused=True),
        micro_batches=1,
    )
    assert isinstance(found, Unknown)
    assert "A100" in found.why
