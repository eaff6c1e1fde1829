"""Other runs under FSDP: torchtitan (FSDP2, H100) and AnswerDotAI/fsdp_qlora (FSDP1, RTX 3090 and 4090).

torchtitan's rows are Llama-3.1-8B with its own model code, selective recomputation of operators, fp32 weights gathered
in bf16 and reduced in fp32, fused AdamW, clipped gradients; compiled rows are left out, as are those in float8.
fsdp_qlora's rows print the reserved bytes of the fourth step: dummy sequences of one length, everything bf16, layers
checkpointed by a reentrant wrapper. Rows of 512 tokens are left out: they peak while the model is loaded and sharded.
"""

from __future__ import annotations

from importers.common import GIB, Row, printed, published
from peftplan.records import Record

_TITAN: Row = {
    "model": "meta-llama/Llama-3.1-8B",
    "method": "full",
    "precision": "fp32",
    "recompute": "selective",
    "attention": "flash_attention_2",
    "batching": "exact",
    "gpu": "h100",
    "layout": "fsdp",
    "set": {
        "layout.param_dtype": "bf16",
        "layout.reduce_dtype": "fp32",
        "optimizer.impl": "fused",
        "model.use_cache": False,
        "loop.outputs_until": "loss",
        "loop.max_grad_norm": 1.0,
    },
}
_QLORA: Row = {
    "rank": 64,
    "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"],
    "precision": "bf16",
    "dtype": "bf16",
    "adapter_dtype": "bf16",
    "layout": "fsdp1",
    "gpus": 2,
    "recompute": "full",
    "attention": "sdpa",
    "batching": "padded",
}
_LORA_OFF = (
    "reserved, not allocated: the one row that prints both (4) is right in both; the more sequences, the more its "
    "allocator held beyond the peak (5 to 13 %), which a replay of streams apart does not show"
)


_TITAN_OFF = (
    "torchtitan's own model code in another torch (2025-03) than the other two rows, which are within 1 %: fewer "
    "temporaries in a layer's backward"
)


def wants(row: Row) -> bool:
    """Eager rows with a known setup, no offload, and a peak in the step."""
    if row["id"].startswith(("titan-t1-", "titan-t3-", "gh-titan996-base")):
        return not row.get("kernels")
    sharded = str(row.get("parallel", {}).get("fsdp", "")).startswith("FULL_SHARD")
    ours = row["id"].startswith("fsdpq-") and "Llama-2-7b" in row["model"]
    return bool(ours and sharded and row["parallel"].get("offload") is None and row["seq_len"] > 512)


def record(row: Row) -> Record:
    titan = "titan" in row["id"]
    job = _titan(row) if titan else _qlora(row)
    digits = 2 if "." in str(row["measured"]["mem_value"]) and not titan else 1
    peak = printed("reserved_peak", row["measured"]["mem_value"], unit=GIB, digits=digits)
    why = _TITAN_OFF if titan else _LORA_OFF
    peak = peak.model_copy(update={"why_off": why})
    return published(row, job=job, measured=(peak,), campaign="torchtitan" if titan else "fsdp_qlora")


def _titan(row: Row) -> Row:
    world = row["parallel"]["world_size"]
    machine = {"gpus": min(world, 8), "nodes": max(1, world // 8)}
    return {**_TITAN, **machine, "micro_batch": row["batch_per_gpu"], "seq_len": row["seq_len"]}


def _qlora(row: Row) -> Row:
    packed = {"format.prepare": False, "format.double_quant": True} if row["method"] == "qlora" else {}
    settings = {"model.use_cache": False, "recompute.use_reentrant": True, "method.lora_dropout": 0.1, **packed}
    machine = {"gpu": "rtx-4090" if "4090" in row["id"] else "rtx-3090"}
    batch = {"micro_batch": row["batch_per_gpu"], "seq_len": row["seq_len"]}
    return {**_QLORA, **machine, **batch, "model": row["model"], "method": row["method"], "set": settings}
