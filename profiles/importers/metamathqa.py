"""PEFT's method comparison on MetaMathQA (huggingface/peft, method_comparison): one GPU, many methods.

What its numbers count: `reserved_peak` is max_memory_reserved once at the end of the run, minus the 2 MiB
held before loading; CUDA context excluded. It belongs to the largest batch, which comes right after an
empty_cache. `allocated_between_steps` is the mean of memory_allocated after each step, with gradients and the
step's outputs still alive.
"""

from __future__ import annotations

from typing import Any

from importers.common import Row, beyond, exact, without_none
from peftplan.hardware.find import find_gpu
from peftplan.hardware.gpus import usable_bytes
from peftplan.records import Measured, Record

LONGEST = 702
"""Padded length of the largest batch of four. The harness does not state it; replaying the caching allocator
over traced steps gives the measured reserved_peak within 0.4 % at this one length for five methods at once
(LoRA r64, LoRA-FA, IA3, LN tuning, full; 2026-11). An estimate without allocator puts it at 730."""
SHORTEST = 80
"""Padded length of the batch before it. Batches come from buckets of 80 samples sorted long to short, so the largest
batch is the first of its bucket and follows the shortest four of 80 (utils.py). About two fifths of the mean of 210
tokens; any value from 1 to 100 moves the prediction by less than 0.6 %."""
MEAN_PADDED_TOKENS = 871
"""Mean padded tokens of a batch, from the token counts of the runs' logs (+4 % padding), 2026-08."""
OUTPUT_BYTES_PER_TOKEN = 128_256 * 2 + 28 * 2 * 1_024 * 2 + 24
"""bf16 logits, the KV cache of 28 layers x 2 x 1,024, and three int64 inputs: alive until the next step."""
_HARNESS = {
    "optimizer.impl": "foreach",
    "loop.outputs_until": "next",
    "allocator.empty_cache": True,
    "allocator.seq_len_before": SHORTEST,
    "load.on_device": True,
}
_OSF_BEFORE = "OSF of PEFT up to 0.19, which put each whole weight together anew in every forward and kept it"
"""From 0.21 on it adds a low-rank branch instead. A graph written as 0.19 did it reserves 36.03 GiB for these runs,
within 0.5 % of them (2026-11)."""
_UNFREEZES = "2026-07-14"
"""From run.py at d787f51bb on, the wiki pass under `disable_adapter` sets requires_grad on everything adapter-like."""
_NEUTRAL = (None, False, "none", 0, 0.0)
_LORA_KNOBS = ("use_bdlora", "use_rslora", "use_dora", "lora_dropout", "lora_bias", "bias", "modules_to_save")


def record(row: Row) -> Record:
    """The record of one run."""
    measured, provenance = row["measured"], row["provenance"]
    return Record(
        id=row["run_id"].replace("MetaMathQA/", "metamathqa/"),
        kind="published",
        source=f"{provenance['repo']}:{provenance['path']}",
        source_rev=f"{provenance['snapshot_head'][:10]} (blob {provenance['git_blob'][:10]})",
        date=row["created_at"][:10],
        campaign=f"metamathqa-{row['created_at'][:7]}",
        gpu=row["gpu"],
        job=without_none(_job(row)),
        measured=_measured(row),
        setup_known="full",
        gaps=_gaps(row),
        trainable_params=measured["num_trainable_params"],
        notes=_notes(row),
        versions=", ".join(f"{key} {row['versions'][key]}" for key in ("torch", "transformers", "peft")),
    )


def _job(row: Row) -> Row:
    train = row["train"]
    config = row["peft_config"] or {}
    targets = config.get("target_modules")
    return {
        "model": train["model_id"],
        "method": _method(row),
        "rank": None if row["peft_type"] == "ADALORA" else config.get("r"),  # its own is init_r; PEFT ignores r
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "set": {**_HARNESS, **_knobs(row["peft_type"], config)},
        "dtype": "bfloat16",
        "precision": "bf16",
        "adapter_dtype": "auto" if train.get("autocast_adapter_dtype", True) else "bfloat16",
        "optimizer": "adamw",
        "micro_batch": train["batch_size"],
        "seq_len": LONGEST,
        "batching": "padded",
        "recompute": "full" if train.get("gradient_checkpointing") else "none",
        "attention": "sdpa",
        "gpu": None if _beyond_card(row) else row["gpu"],
    }


def _method(row: Row) -> str:
    if _lora_fa(row):
        return "lora_fa"
    return "full" if row["peft_type"] == "FULL_FINETUNING" else str(row["peft_type"]).lower()


def _lora_fa(row: Row) -> bool:
    return bool(row["train"]["optimizer_type"] == "lora-fa")


def _beyond_card(row: Row) -> bool:
    """Whether it held more than the card of that name has: the card was another (a 4090 of 48 GB), or memory of the
    host's stood in. A prediction for the card itself would give cached memory back at its limit."""
    card: int | None = usable_bytes(find_gpu(row["gpu"])).bytes
    return card is not None and row["measured"]["memory_reserved_max_bytes"] > card


def _knobs(peft_type: str, config: Row) -> Row:
    """The method's own settings that are not their neutral value."""
    ignored = ("r", "target_modules", "task_type", "peft_type", "peft_version", "base_model_name_or_path")
    keys = _LORA_KNOBS if peft_type == "LORA" else [key for key in config if key not in ignored]
    chosen = {key: config.get(key) for key in keys if _counts(config.get(key))}
    if peft_type == "ADALORA":  # every run is older than peft 0.21.0
        chosen["trains_ranknum"] = False
    return {f"method.{key}": value for key, value in chosen.items()}


def _counts(value: Any) -> bool:
    return value not in _NEUTRAL and value != {} and value != []


def _gaps(row: Row) -> tuple[str, ...]:
    config = row["peft_config"] or {}
    found = []
    half_frozen = _lora_fa(row) or config.get("init_lora_weights") == "mica"
    if half_frozen and row["created_at"] >= _UNFREEZES:
        found.append("the harness runs the model without its adapter, after which the frozen factor has gradients too")
    if row["peft_type"] == "OFT" and not config.get("oft_block_size") and row["versions"]["peft"] < "0.16":
        found.append("OFT of PEFT up to 0.15, with other blocks")
    if row["peft_type"] == "OSF" and row["versions"]["peft"] < "0.20":
        found.append(_OSF_BEFORE)
    if row["experiment_name"].endswith("steps1000-ff"):
        found.append("its memory is that of full fine-tuning, its config says LoRA")
    return tuple(found)


def _measured(row: Row) -> tuple[Measured, ...]:
    found = row["measured"]
    reserved = exact("reserved_peak", found["memory_reserved_max_bytes"], why_off=_why_off(row))
    trainable = found["num_trainable_params"]
    if trainable is None or row["train"]["batch_size"] != 4:
        return (reserved,)
    grads = trainable * (2 if row["peft_type"] in ("FULL_FINETUNING", "LN_TUNING") else 4)
    outputs = MEAN_PADDED_TOKENS * OUTPUT_BYTES_PER_TOKEN
    between = beyond(
        "allocated_between_steps",
        found["memory_allocated_after_step_avg_bytes"],
        extra_bytes=grads + outputs,
        why="gradients, the step's logits and KV cache are still allocated",
    )
    return (reserved, between)


def _why_off(row: Row) -> str | None:
    if row["harness"]["empty_cache_every_steps"] in (None, 1):
        return None
    if row["peft_type"] == "PREFIX_TUNING":
        return (
            "the run's maximum belongs to its validation, whose generation needed 1 GiB more from 2026 on: the same "
            "training step under the harness of 2025 reserved 19.45 GiB; transformers' cache by now copies what it is "
            "given, and the prefix of 50 sequences takes 1.07 GiB"
        )
    return (
        "the cache was emptied every tenth step only, so the batches after the largest, nearly as long, met its "
        "segments; only the largest is replayed"
    )


def _notes(row: Row) -> str:
    every = row["harness"]["empty_cache_every_steps"]
    return f"empty_cache every {every} step(s); reserved over the whole run minus 2 MiB; inferred largest batch"
