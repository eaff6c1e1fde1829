"""A dry run of what was written: the same architecture, tiny and random, two optimizer steps on the CPU."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from peftplan import formats, trainers
from peftplan.job import Job
from peftplan.trainers import Run, Trainer
from peftplan.trainers.base import decided

MODEL, DATA = "smoke/model", "smoke/data.jsonl"
TINY = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Sizes that every family of decoders accepts; whatever else its config says stays."""
_PER_LAYER = ("layer_types", "no_rope_layers", "rope_scaling")
"""Lists as long as the model is deep, and rotations made for its length: left to the config class."""
RANK = 8


def tiny_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a tiny model of the same architecture: grouped where the model groups its heads."""
    kept = {key: value for key, value in config.items() if key not in _PER_LAYER}
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    tiny = {key: value for key, value in TINY.items() if key != "head_dim" or "head_dim" in config}
    grouped = heads is not None and kv_heads is not None and kv_heads < heads
    return {**kept, **tiny, "num_key_value_heads": 2 if grouped else 4, "dtype": "float32"}


def job_of(job: Job, trainer: Trainer) -> Job:
    """`job` on the tiny model, short and on one CPU process, everything else as asked and as the trainer settles it."""
    full = trainer.settled(decided(job), asked=job)
    return full.model_copy(
        update={
            "model": MODEL,
            "config": tiny_config(full.config or {}),
            "rank": full.rank and min(full.rank, RANK),
            "micro_batch": min(full.micro_batch, 2),
            "seq_len": min(full.seq_len or 64, 64),
            "grad_accum": min(full.grad_accum, 2),
            "attention": "sdpa",
            **_halves(full, trainer),
            "backend": "cpu",
            **dict.fromkeys(("layout", "offload", "kernels", "gpu"), None),
            "gpus": 1,
            "nodes": 1,
        }
    )


def _halves(full: Job, trainer: Trainer) -> dict[str, Any]:
    """bf16 where the job has fp16: the CPU's kernels for fp16 are incomplete. fp32 where the trainer cannot bf16."""
    if not trainer.half_on_cpu:
        return {"dtype": "float32", "precision": "fp32", "format": full.format if _is_packed(full) else None}
    if full.dtype != "float16":
        return {}
    return {"dtype": "bfloat16", "precision": (full.precision or "bf16").replace("fp16", "bf16")}


def _is_packed(job: Job) -> bool:
    return job.format is not None and formats.get(job.format)().packed


def files(job: Job, *, trainer: str) -> dict[str, str]:
    """The files of the dry run, and `smoke.sh` that starts it."""
    small = job_of(job, trainers.get(trainer))
    run = Run(dataset=DATA, output_dir="smoke/out", max_steps=2, on_cpu=True)
    folder = trainers.write_folder(small, trainer=trainer, run=run)
    made = {f"smoke/{name}": text for name, text in folder.files.items()}
    command = folder.command
    for name in folder.files:
        command = command.replace(name, f"smoke/{name}")
    maker = resources.files(__package__).joinpath("tiny_model.txt").read_text("utf-8")
    return {
        **made,
        "smoke/config.json": json.dumps(small.config, indent=2) + "\n",
        "smoke/make.py": maker,
        "smoke.sh": f'#!/usr/bin/env bash\nset -euo pipefail\ncd "$(dirname "$0")"\npython smoke/make.py\n{command}\n',
    }
