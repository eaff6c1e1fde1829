"""A hand-made Estimate for tests of reports and of the command line; its numbers are invented."""

from __future__ import annotations

from typing import Any

from peftplan.breakdown import Saving
from peftplan.job import Job, make_job
from peftplan.report.cards import Card
from peftplan.result import Estimate, Term

GIB = 2**30
_AT_PEAK = {
    "weight": 3_866_624_000,
    "activation": 3_124_756_480,
    "gradient": 402_653_184,
    "adapter": 33_554_432,
    "state": 67_108_864,
    "workspace": 134_217_728,
}

CARDS = (
    Card(name="RTX 3060 12GB", usable_bytes=12 * GIB - 500_000_000),
    Card(name="T4 16GB", usable_bytes=15 * GIB),
    Card(name="RTX 4090 24GB", usable_bytes=23 * GIB),
    Card(name="A100 40GB", usable_bytes=39 * GIB),
    Card(name="H100 80GB", usable_bytes=79 * GIB),
)


def job(**fields: Any) -> Job:
    return make_job(
        **{
            "model": "llama-7b", "method": "qlora", "rank": 8, "format": "nf4", "precision": "bf16",
            "optimizer": "adamw", "micro_batch": 8, "seq_len": 512, **fields,
        }
    )  # fmt: skip


def estimate(**changes: Any) -> Estimate:
    """The sample with whole sections (`fit=...`, `time=...`) replaced."""
    peak = sum(_AT_PEAK.values())
    sections: dict[str, Any] = {
        "version": "1",
        "job": job(),
        "parameters": {"total": 6_742_609_920, "trainable": 4_194_304, "stored_bytes": 3_882_000_000},
        "memory": {
            "peak_bytes": peak,
            "reserved_bytes": peak + 268_435_456,
            "device_bytes": peak + 268_435_456 + 620_000_000,
            "static_bytes": 3_967_287_296,
            "saved_for_backward_bytes": 3_000_000_000,
            "at_peak": _AT_PEAK,
            "at_peak_phase": "backward",
            "phases": {
                "load": 3_866_624_000,
                "forward": 6_812_000_000,
                "loss": 7_301_000_000,
                "backward": peak,
                "optimizer": 4_102_000_000,
            },
        },
        "flops": {
            "forward": 54_000_000_000_000, "backward": 55_000_000_000_000,
            "recompute": 0, "optimizer": 60_000_000, "total": 109_000_060_000_000,
        },
        "time": {"step_seconds": None, "tokens_per_second": None, "mfu": None, "breakdown": None},
        "cost": {
            "usd_per_hour": 0.69, "usd_per_million_tokens": None, "usd_total": None, "energy_kwh": None,
        },
        "fit": {
            "gpu": "NVIDIA GeForce RTX 4090", "usable_bytes": 23 * GIB,
            "headroom_bytes": 23 * GIB - peak - 888_435_456, "verdict": "fits", "confidence": "calibrated",
        },
        "assumptions": [{"what": what, "value": value, "why": why} for what, value, why in _ASSUMPTIONS],
        **changes,
    }  # fmt: skip
    return Estimate.model_validate(sections)


def savings() -> tuple[Saving, ...]:
    return (
        Saving(change="recompute full", job=job(recompute="full"), saved_bytes=2_800_000_000, peak_bytes=GIB),
        Saving(change="micro-batch 4", job=job(micro_batch=4), saved_bytes=1_763_704_832, peak_bytes=2 * GIB),
        Saving(change="fused loss", job=job(kernels="liger"), saved_bytes=402_653_184, peak_bytes=3 * GIB),
    )


def terms() -> tuple[Term, ...]:
    """Terms that sum to the sample's peak."""
    return tuple(
        Term(name=name, bytes=size, kind=kind, formula=formula, source=source)
        for name, size, kind, formula, source in _TERMS
    )


_MODELING = "transformers 5.23.0, modeling_llama.py"
_TERMS = (
    (
        "packed base weights",
        3_238_002_688,
        "weight",
        "L 32 × 202,375,168 / 2",
        "bitsandbytes 0.50.2, quantize_4bit",
    ),
    ("embedding", 262_144_000, "weight", "V 32,000 × H 4,096 × 2 bytes", _MODELING),
    (
        "absmax",
        366_477_312,
        "weight",
        "202,375,168 × 32 / 64 × (1 + 4 / 256)",
        "QLoRA, arXiv:2305.14314, section 3",
    ),
    (
        "SiLU and gate",
        2_164_260_864,
        "activation",
        "3 × B 8 × S 512 × F 11,008 × 2 bytes × 8",
        "torch 2.13.0",
    ),
    ("hidden states in fp32", 960_495_616, "activation", "B × S × H × 4 bytes", _MODELING),
    ("gradient of the logits", 402_653_184, "gradient", "B × S × V × 4 bytes", "torch 2.13.0"),
    (
        "adapter",
        33_554_432,
        "adapter",
        "r 8 × (d_in + d_out) × 4 bytes",
        "LoRA, arXiv:2106.09685, equation 3",
    ),
    ("moments", 67_108_864, "state", "2 × trainable × 4 bytes", "torch 2.13.0"),
    ("foreach temporaries", 134_217_728, "workspace", "trainable × 4 bytes", "torch 2.13.0"),
)
_ASSUMPTIONS = (
    ("batching", "padded", "a batch of unequal lengths carries a padding mask"),
    ("model.use_cache", True, "transformers builds a KV cache in training unless told not to"),
    (
        "attention",
        "sdpa",
        "the default; with a mask it takes the memory-efficient kernel, and repeats K and V",
    ),
    ("recompute", "none", "the Trainer's default; `full` keeps one tensor per layer"),
    ("micro_batch", 8, "the Trainer's default per_device_train_batch_size"),
    ("seq_len", 512, "a common choice; no default exists"),
    ("context_bytes", 620_000_000, "measured on other cards of this architecture; within 100 MB"),
    ("time.step_seconds", None, "the clock is not calibrated for this GPU yet"),
)
