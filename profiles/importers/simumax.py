"""MooreThreads/SimuMax, docs/b200: Megatron-LM 23e00ed0 on TransformerEngine 2.11 and torch 2.10, 8x B200, 2026-04.

Megatron's own arguments in that repository's scripts: bf16, distributed optimizer, fp32 `main_grad`, sequence parallel
wherever tp > 1, TE's fused cross-entropy, no recomputation, mock data of full rows; context parallelism by all-to-all.
One measurement of memory is printed for all numbers of micro-batches of a layout. `max_allocated_mib_by_rank` is
torch's max_memory_allocated; the fullest rank's counts.
"""

from __future__ import annotations

from importers.common import GIB, MIB, Row, exact, printed, published
from peftplan.records import Record

_STREAMS = (
    "TransformerEngine exchanges tokens for heads on a stream of its own, whose memory the allocator keeps apart from "
    "the rest; the replay has one stream"
)


def wants(row: Row) -> bool:
    """Its Llama rows; those of DeepSeek have latent attention and experts, which no Megatron graph here has."""
    return bool(row["id"].startswith("simumax-llama"))


def record(row: Row) -> Record:
    found, unit = row["measured"], MIB
    measured = (
        exact("allocated_peak", max(found["max_allocated_mib_by_rank"].values()) * unit),
        printed("reserved_peak", found["reserved_gib"], unit=GIB, digits=2).model_copy(update={"why_off": _why(row)}),
    )
    return published(row, job=_job(row), measured=measured, campaign="simumax-b200")


def _why(row: Row) -> str | None:
    return _STREAMS if row["parallel"]["cp"] > 1 else None


def _job(row: Row) -> Row:
    return {
        "model": "llama-3-70b",
        "config": _config(row["model_dims"]),
        "method": "full",
        "precision": "bf16",
        "optimizer": "adamw",
        "micro_batch": row["batch_per_gpu"],
        "grad_accum": row["grad_accum"],
        "seq_len": row["seq_len"],
        "batching": "exact",
        "recompute": "none",
        "attention": "sdpa",
        "gpu": "b200",
        "gpus": row["parallel"]["world_size"],
        "layout": _words(row["parallel"]),
        "set": {"layout.framework": "megatron", "loop.outputs_until": "loss"},
    }


def _config(sizes: Row) -> Row:
    return {
        "model_type": "llama",
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["intermediate"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["head_dim"],
        "vocab_size": sizes["vocab"],
        "tie_word_embeddings": sizes["tied"],
        "max_position_embeddings": 131_072,
    }


def _words(spread: Row) -> str:
    words = ["zero1", f"dp={spread['dp']}"]
    words += [f"tp={spread['tp']}", "sp"] if spread["tp"] > 1 else []
    words += [f"ulysses={spread['cp']}"] if spread["cp"] > 1 else []
    return ",".join([*words, *([f"pp={spread['pp']}"] if spread["pp"] > 1 else [])])
