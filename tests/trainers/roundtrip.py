"""What every trainer's reading and writing must satisfy, whatever it can express."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from peftplan import trainers
from peftplan.errors import RequestError
from peftplan.job import Job
from peftplan.trainers import Run
from peftplan.trainers.base import decided, fields_of
from peftplan.trainers.rules import Inexpressible

MODEL = "llama-7b"


def jobs(**more: st.SearchStrategy[Any]) -> st.SearchStrategy[Job]:
    """Jobs that differ in what trainers spell differently; `more` adds fields."""
    maybe = st.none
    return st.builds(
        Job,
        model=st.just(MODEL),
        method=st.sampled_from(("full", "lora", "qlora", "dora", "rslora", "qdora", "ia3", "oft")),
        dtype=maybe() | st.sampled_from(("bf16", "fp16", "fp32")),
        precision=maybe() | st.sampled_from(("bf16", "bf16-mixed", "fp16-mixed")),
        format=maybe() | st.sampled_from(("nf4", "fp4", "int8")),
        optimizer=maybe() | st.sampled_from(("adamw", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit")),
        micro_batch=st.sampled_from((1, 4)),
        grad_accum=st.sampled_from((1, 2)),
        seq_len=maybe() | st.just(512),
        batching=maybe() | st.sampled_from(("padded", "packed", "exact")),
        recompute=maybe() | st.sampled_from(("none", "full")),
        attention=maybe() | st.sampled_from(("sdpa", "eager", "flash_attention_2")),
        **more,
    )


def written(trainer: str, job: Job) -> dict[str, Any] | None:
    """The job's config; None where the trainer or peftplan refuses it."""
    try:
        return trainers.get(trainer).config(job, Run())
    except (Inexpressible, RequestError):
        return None


def assert_round_trip(trainer: str, job: Job) -> None:
    """Every choice of the job comes back, and what comes back is written the same again."""
    config = written(trainer, job)
    if config is None:
        return
    back = trainers.get(trainer).read(config, name="written")
    said, heard = fields_of(decided(job)), fields_of(decided(back))
    assert {key: heard.get(key) for key in said} == said
    assert trainers.get(trainer).config(back, Run()) == config
