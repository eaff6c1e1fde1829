"""Explain and savings: the terms are the peak, and the changes do what they say."""

from __future__ import annotations

import pytest

from peftplan import Job, estimate, explain, savings

JOBS = [
    Job(model="llama-7b", method="lora", micro_batch=2, seq_len=512),
    Job(model="qwen2.5-0.5b", method="full", micro_batch=1, seq_len=128),
    Job(model="tinyllama-1.1b", method="qlora", micro_batch=4, seq_len=256, gpu="t4"),
    Job(model="smollm2-135m", method="lora", micro_batch=3, seq_len=64, backend="cpu", attention="eager"),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda j: f"{j.model}-{j.method}")
def test_terms_sum_to_the_peak_kind_by_kind(job: Job) -> None:
    memory = estimate(job).memory
    terms = explain(job)
    assert sum(t.bytes for t in terms) == memory.peak_bytes
    for kind, size in memory.at_peak.items():
        assert sum(t.bytes for t in terms if t.kind == kind) == size, kind
    assert all(t.formula and t.source for t in terms)


@pytest.mark.parametrize("job", JOBS, ids=lambda j: f"{j.model}-{j.method}")
def test_each_saving_saves_what_it_says(job: Job) -> None:
    answer = estimate(job)
    found = savings(job, answer)
    assert 1 <= len(found) <= 3
    for saving in found:
        assert estimate(saving.job).memory.peak_bytes == saving.peak_bytes
        assert saving.saved_bytes == answer.memory.peak_bytes - saving.peak_bytes > 0
    assert [s.saved_bytes for s in found] == sorted((s.saved_bytes for s in found), reverse=True)
