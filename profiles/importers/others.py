"""Smaller single-GPU sources: litgpt's config hub, ms-swift's length table, torch-preflight, torchtune.

None of them is a plain transformers + PEFT step, so their records say what is missing (`gaps`); they are kept
because every one that becomes expressible is one more independent check.
"""

from __future__ import annotations

from importers.common import GIB, Row, exact, printed, published
from peftplan.records import Measured, Record

_LITGPT = "litgpt's own model code: fused qkv LoRA, adapters and loss in bf16, logits in chunks of 128"
_SWIFT = (
    "reserved over a whole run of mixed lengths with evaluation; the source's own numbers fall from 512 to "
    "1,024 tokens (chatglm3-6b 13.94 to 12.99 GiB), so they hold to about 1 GiB"
)
_HUB = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "projection": "o_proj"}
_LITGPT_MLP = ["gate_proj", "up_proj", "down_proj"]


def wants(row: Row) -> bool:
    """Fully stated single-GPU rows of these sources that measured memory."""
    ours = row["id"].startswith(("lithub-", "swift-len-", "swift-q-", "tpreflight-", "gh-tune527-"))
    return (
        ours
        and row["confidence"] == "full"
        and row["phase"] == "train"
        and row["parallel"].get("world_size", 1) == 1
        and isinstance(row["measured"].get("mem_value"), int | float)
    )


def record(row: Row) -> Record:
    family = row["id"].split("-", 1)[0]
    job, measured, gaps = {"lithub": _lithub, "swift": _swift, "tpreflight": _preflight, "gh": _tune}[family](row)
    return published(row, job=job, measured=measured, campaign=family, gaps=gaps)


_Parts = tuple[Row, tuple[Measured, ...], tuple[str, ...]]


def _base(row: Row) -> Row:
    config = row.get("method_config", {})
    return {
        "model": row["model"],
        "method": row["method"],
        "rank": config.get("r"),
        "optimizer": "adamw",
        "micro_batch": row["batch_per_gpu"],
        "seq_len": row["seq_len"],
    }


def _lithub(row: Row) -> _Parts:
    config = row.get("method_config", {})
    names = config.get("targets", "").split(",")
    targets = [_HUB[name] for name in names if name in _HUB] + (_LITGPT_MLP if "mlp" in names else [])
    targets += ["lm_head"] if "head" in names else []
    lora = row["method"] != "full"
    job = _base(row) | {
        "target_modules": targets or None,
        "set": {"method.lora_dropout": config["dropout"], "model.use_cache": False} if lora else {},
        "format": "nf4" if row.get("quantization") else None,
        "dtype": "bfloat16",
        "precision": "bf16",
        "adapter_dtype": "bfloat16" if lora else "auto",
        "batching": "exact",
        "recompute": "none",
        "attention": "sdpa",
    }
    return job, (printed("allocated_peak", row["measured"]["mem_value"], unit=10**9, digits=2),), (_LITGPT,)


def _swift(row: Row) -> _Parts:
    job = _base(row) | {
        "method": "lora" if "gptq" in row["method"] else row["method"],
        "target_modules": row["method_config"]["targets"].split(","),
        "set": {"model.use_cache": False, "loss.style": "shifted_fp32_logits"},
        "format": _swift_format(row.get("quantization", "")),
        "dtype": "bfloat16",
        "precision": "bf16-mixed",
        "grad_accum": row["grad_accum"],
        "batching": "exact",
        "recompute": "full",
        "attention": "flash_attention_2",
    }
    return job, (printed("reserved_peak", row["measured"]["mem_value"], unit=GIB, digits=2),), (_SWIFT,)


def _swift_format(quantization: str) -> str | None:
    return "gptq" if "gptq" in quantization else "nf4" if "bnb" in quantization else None


def _preflight(row: Row) -> _Parts:
    found = row["measured"]
    job = _base(row) | {
        "set": {"optimizer.impl": "foreach"},
        "dtype": "float32",
        "precision": "fp16-mixed",
        "batching": "exact",
        "recompute": "none",
        "attention": "sdpa",
        "gpu": "t4",
    }
    measured = (
        exact("allocated_peak", found["mem_value"]),
        exact("reserved_peak", found["reserved_bytes"]),
        exact("device", found["reserved_bytes"] + found["cuda_context_bytes"]),
    )
    return job, measured, (f"{row['model']} architecture", "GradScaler")


def _tune(row: Row) -> _Parts:
    found = row["measured"]
    job = _base(row) | {
        "method": "full",
        "optimizer": "paged_adamw",
        "micro_batch": 2,
        "seq_len": None,
        "dtype": "bfloat16",
        "precision": "bf16",
        "recompute": "full",
    }
    measured = (
        exact("allocated_peak", found["mem_value"] * 1e9),
        exact("reserved_peak", found["reserved_gb"] * 1e9),
    )
    return (
        job,
        measured,
        ("optimizer in backward: gradients are freed as they appear", "alpaca's own lengths"),
    )
