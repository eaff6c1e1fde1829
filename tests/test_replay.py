"""The replay asks for memory in the order in which the real model does."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import reserve
from peftplan.job import Job, make_job
from peftplan.pipeline import read
from peftplan.step.allocator import CachingAllocator
from peftplan.step.replay import replay

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 544,
    "vocab_size": 1111,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "tie_word_embeddings": True,
}
TOKENS = 256
CASES: list[tuple[int, dict[str, Any]]] = [
    (100_000, {"attention": "eager", "recompute": "full"}),
    (100_000, {"attention": "eager", "recompute": "none"}),
    (200_000, {"attention": "eager", "recompute": "full", "micro_batch": 2}),
    (100_000, {"attention": "sdpa", "recompute": "none"}),
    (200_000, {"attention": "eager", "recompute": "full", "format": "nf4"}),
    (100_000, {"attention": "eager", "recompute": "every_n"}),
    (100_000, {"attention": "sdpa", "recompute": "selective"}),
    (100_000, {"attention": "eager", "recompute": "none", "offload": "activations"}),
    (100_000, {"attention": "eager", "recompute": "selective"}),
    (100_000, {"attention": "eager", "recompute": "full", "offload": "activations"}),
    (100_000, {"attention": "sdpa", "recompute": "every_n", "offload": "activations"}),
]
"""The bytes from which requests are compared: hidden states and larger. Below are position tables, halves of rotated
vectors and adapters, some of which are counted in one."""


def job_of(fields: dict[str, Any]) -> Job:
    base = {"model": "tiny", "config": CONFIG, "backend": "cpu", "method": "lora", "rank": 4, "micro_batch": 1}
    return make_job(**{**base, "seq_len": TOKENS, "batching": "exact", "dtype": "bfloat16", **fields})


def asked(job: Job, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each request in the last step of a replay."""
    seen: list[int] = []
    alloc = CachingAllocator.alloc

    def note(self: CachingAllocator, identity: int, size_bytes: int) -> None:
        seen.append(size_bytes)
        alloc(self, identity, size_bytes)

    monkeypatch.setattr(CachingAllocator, "alloc", note)
    monkeypatch.setattr(CachingAllocator, "reset_peaks", lambda _: seen.clear())
    reading = read(job)
    reserve.usage(reading.case, reading.graph, 0)
    return seen


@pytest.mark.parametrize(("seen_from", "fields"), CASES, ids=str)
def test_requests_come_in_the_order_of_a_trace(
    seen_from: int, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftplan.instruments.trace import trace

    job = job_of(fields)
    events = [e for e in trace(job).events if e.phase not in ("static", "optimizer")]
    traced = [e.bytes for e in events if e.action == "alloc" and e.bytes >= seen_from]
    assert len(traced) > 50
    assert [size for size in asked(job, monkeypatch) if size >= seen_from] == traced


@pytest.mark.parametrize(
    "fields",
    [
        {"recompute": "full", "set": {"recompute.use_reentrant": True}, "precision": "bf16-mixed"},
        {"recompute": "full"},
        {"recompute": "every_n", "offload": "activations"},
        {"recompute": "selective", "offload": "activations"},
        {"recompute": "none", "offload": "activations"},
        {"recompute": "unsloth", "seq_len": 8192},
        {"method": "full", "rank": None, "recompute": "full", "offload": "activations"},
        {"method": "full", "rank": None, "set": {"loop.outputs_until": "next"}},
    ],
    ids=str,
)
def test_steps_after_the_second_add_nothing(fields: dict[str, Any]) -> None:
    job = job_of({"gpu": "a100-80gb", "backend": "cuda", **fields})
    reading = read(job)
    case, graph = reading.case, reading.graph
    around = reserve.around(case, graph, reading.static["workspace"])
    found = [
        replay(
            [graph] * steps,
            around,
            recompute=case.recompute,
            loop=case.loop,
            entry_requires_grad=case.recompute.layers,
        )
        for steps in (2, 4)
    ]
    assert found[0] == found[1]
