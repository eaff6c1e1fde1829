"""Jobs that differ in what trainers spell differently, as a hypothesis strategy."""

from __future__ import annotations

from hypothesis import strategies as st

from peftplan.job import Job

MODEL = "llama-7b"


def jobs() -> st.SearchStrategy[Job]:
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
    )
