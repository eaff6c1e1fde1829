"""fitcheck-llm 0.3.1 (Anassbzdd/fitcheck): LoRA and QLoRA steps on a T4, with peaks per phase.

Setup read from scripts/measure.py of the PyPI source distribution (2026-11-21): fp16 base without autocast;
nf4 without double quantization, through prepare_model_for_kbit_training; adapters fp32, dropout 0;
non-reentrant checkpointing; use_cache off; equal lengths and no mask; torch AdamW (foreach); `out` is a
local, so the logits stay alive until the optimizer has stepped. "flash" rows pin SDPA to its memory-efficient
kernel and expand K and V.

How the quantized rows were loaded is inferred. transformers 5.0.0 loads ahead with up to four threads while it
quantizes, a race; 5.17.0 does not, and PEFT 0.20.0 empties the cache after the casts, which 0.19.1 does not. Yet in the
campaign of 09-15, said to have run 5.17.0 and 0.20.0, equal loads end with different bytes (TinyLlama: 1,070.05 to
1,077.55 MiB), so its threads raced; with four equally fast threads and the cache kept, the replay gives SmolLM2-135M
within 2 MiB four times of four and SmolLM2-1.7B within 20 MiB. The campaign of 09-01, said to have run 5.0.0, is given
exactly in three rows of four with no thread ahead. Those of 09-16 and 09-21 (5.0.0) raced too, by the same sign;
how far the threads got ahead is not known, and no thread ahead is assumed, which errs low: one job of 09-21 reserved
11,880 MiB once and 13,272 MiB again.
"""

from __future__ import annotations

from importers.common import MIB, Row, exact, printed, published
from peftplan.records import Measured, MemoryKind, Record

_MODULES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_LOADED = (
    "weights of 1 to 10 MiB share segments of 20 MiB, and a rest of up to 1 MiB at a segment's end counts as "
    "allocated: 14 MiB in 0.7 GiB here, which replaying the allocator over the unquantized load gives to 1 "
    "KiB; quantizing while loading leaves more or less of it from run to run"
)
_RACED = (
    "threads loaded ahead while weights were quantized (transformers 5.0.0): how much full-precision memory that left "
    "cached differs from run to run (11,880 and 13,272 MiB for one job of Qwen2.5-7B) and is not known; replayed with "
    "equally fast threads, or none ahead, where the campaign says nothing"
)
_THREADS = {"09-15": 4}
"""Threads that load ahead, by campaign; none where it is not listed."""
_PHASES: tuple[tuple[MemoryKind, str, str | None], ...] = (
    ("allocated_peak_forward", "peak_forward_mib", None),
    ("allocated_peak_backward", "peak_backward_mib", None),
    ("allocated_peak_optimizer", "peak_optimizer_mib", None),
    ("allocated_resident", "resident_before_step_mib", _LOADED),
)


def wants(row: Row) -> bool:
    """Rows of this family."""
    return str(row["id"]).startswith("fitcheck-")


def record(row: Row) -> Record:
    return published(row, job=_job(row), measured=_measured(row), campaign=_campaign(str(row["id"])))


def _campaign(identity: str) -> str:
    """`fitcheck-09-15`, `fitcheck-edge`: the day of the sweep, or the runs at the edge of the card."""
    return "-".join(identity.split("-")[: 2 if identity.startswith("fitcheck-edge") else 3])


def _job(row: Row) -> Row:
    config = row["method_config"]
    quantized = row["method"] == "qlora"
    return {
        "model": row["model"],
        "method": row["method"],
        "rank": config["r"],
        "target_modules": [_MODULES[name] for name in config["targets"].split(",")],
        "set": _settings(str(row["id"]), quantized=quantized),
        "format": "nf4" if quantized else None,
        "dtype": "float16",
        "precision": "fp16",
        "adapter_dtype": "float32",
        "optimizer": "adamw",
        "micro_batch": row["batch_per_gpu"],
        "seq_len": row["seq_len"],
        "batching": "exact",
        "recompute": "full",
        "attention": "eager" if row["attention_impl"] == "eager" else "sdpa_efficient",
        "gpu": "t4",
    }


def _settings(identity: str, *, quantized: bool) -> Row:
    settings: Row = {
        "model.use_cache": False,
        "optimizer.impl": "foreach",
        "recompute.use_reentrant": False,
        "method.lora_dropout": 0.0,
        "loop.outputs_until": "step",
    }
    if quantized:
        settings |= {"format.double_quant": False, "load.empty_cache": False}
        threads = next((count for campaign, count in _THREADS.items() if f"-{campaign}-" in identity), 0)
        settings |= {"load.threads": threads} if threads else {}
    return settings


def _measured(row: Row) -> tuple[Measured, ...]:
    found = row["measured"]
    if found.get("oom"):
        return ()
    if "fits" in found:
        return (exact("device", found["mem_value"] * MIB, why_off=_RACED),)
    cached = _cached(row)
    if "peak_forward_mib" not in found:
        return (
            printed("allocated_peak", found["mem_value"], unit=MIB, digits=0),
            printed("reserved_peak", found["peak_reserved_mib"], unit=MIB, digits=0),
            printed("device", found["process_mib"], unit=MIB, digits=0),
        )
    phases = (exact(kind, found[key] * MIB, why_off=why) for kind, key, why in _PHASES)
    return (
        exact("allocated_peak", found["mem_value"] * MIB),
        exact("reserved_peak", found["peak_reserved_mib"] * MIB, why_off=cached),
        exact("device", found["process_mib"] * MIB, why_off=cached),
        *phases,
    )


def _cached(row: Row) -> str | None:
    """What moves reserved bytes beside the job."""
    return _RACED if row["method"] == "qlora" else None
