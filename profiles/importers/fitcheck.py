"""fitcheck-llm 0.3.1 (Anassbzdd/fitcheck): LoRA and QLoRA steps on a T4, with peaks per phase.

Setup read from scripts/measure.py of the PyPI source distribution (2026-11-21): fp16 base without autocast;
nf4 without double quantization, through prepare_model_for_kbit_training; adapters fp32, dropout 0;
non-reentrant checkpointing; use_cache off; equal lengths and no mask; torch AdamW (foreach); `out` is a
local, so the logits stay alive until the optimizer has stepped. "flash" rows pin SDPA to its memory-efficient
kernel and expand K and V.
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
_EAGER = (
    "allocated peaks agree, reuse of freed blocks does not: with long sequences by one or one and a half "
    "score tensors (b x heads x s^2); which temporary takes which block is not established"
)
_QUANTIZED = (
    "not established: allocated peaks agree, and without quantization the rows of this setup are right to "
    "0.1 %, so what quantizing while loading leaves cached is suspected; it is not replayed"
)
_EDGE = (
    "near a full card the allocator gives cached segments back and retries, which is not replayed; the "
    "source itself reads 11.7 and 13.1 GiB for this job of Qwen2.5-7B"
)
_PHASES: tuple[tuple[MemoryKind, str, str | None], ...] = (
    ("allocated_peak_forward", "peak_forward_mib", None),
    ("allocated_peak_backward", "peak_backward_mib", None),
    ("allocated_peak_optimizer", "peak_optimizer_mib", None),
    ("allocated_resident", "resident_before_step_mib", _LOADED),
)


def wants(row: Row) -> bool:
    """Rows of this family that measured something (two are out-of-memory verdicts)."""
    return str(row["id"]).startswith("fitcheck-") and "mem_value" in row["measured"]


def record(row: Row) -> Record:
    return published(row, job=_job(row), measured=_measured(row))


def _job(row: Row) -> Row:
    config = row["method_config"]
    quantized = row["method"] == "qlora"
    return {
        "model": row["model"],
        "method": row["method"],
        "rank": config["r"],
        "target_modules": [_MODULES[name] for name in config["targets"].split(",")],
        "set": _settings(quantized=quantized),
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


def _settings(*, quantized: bool) -> Row:
    settings: Row = {
        "model.use_cache": False,
        "optimizer.impl": "foreach",
        "recompute.use_reentrant": False,
        "method.lora_dropout": 0.0,
        "loop.outputs_until": "step",
    }
    if quantized:
        settings["format.double_quant"] = False
    return settings


def _measured(row: Row) -> tuple[Measured, ...]:
    found = row["measured"]
    if "fits" in found:
        return (exact("device", found["mem_value"] * MIB, why_off=_EDGE),)
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
    if row["attention_impl"] == "eager" and row["seq_len"] > 512:
        return _EAGER
    return _QUANTIZED if row["method"] == "qlora" else None
