"""Jobs side by side: what differs, what that does, revisions of a file."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from peftplan import Comparison, Job, RequestError, compare, estimate
from peftplan.differences import Quantity

LORA = Job(model="llama-7b", method="lora", micro_batch=1, seq_len=128, gpu="h100", tokens=10**6)


def _quantity(found: Comparison, name: str) -> Quantity:
    return next(quantity for quantity in found.answer if quantity.name == name)


def test_only_what_differs_is_a_difference() -> None:
    found = compare(LORA, LORA.model_copy(update={"method": "qlora", "micro_batch": 2}))
    assert {choice.field: choice.values for choice in found.question} == {
        "method": ("lora", "qlora"),
        "format": ("float16", "nf4"),
        "micro_batch": (1, 2),
        "batching": ("exact", "padded"),
        "recompute": ("none", "full"),
    }


def test_a_stated_default_is_no_difference() -> None:
    assert compare(LORA, LORA.model_copy(update={"rank": 8, "optimizer": "adamw"})).question == ()


def test_numbers_are_those_of_the_estimates_and_deltas_are_against_the_first() -> None:
    jobs = [LORA.model_copy(update={"micro_batch": n}) for n in (1, 2, 4)]
    found, answers = compare(*jobs), [estimate(job) for job in jobs]
    expected: dict[str, list[Any]] = {
        "memory.peak_bytes": [a.memory.peak_bytes for a in answers],
        "memory.device_bytes": [a.memory.device_bytes for a in answers],
        "flops.total": [a.flops.total for a in answers],
        "cost.usd_total": [a.cost.usd_total for a in answers],
        "fit.verdict": [a.fit.verdict for a in answers],
        "time.step_seconds.expected": [a.time.step_seconds and a.time.step_seconds.expected for a in answers],
    }
    for name, values in expected.items():
        assert _quantity(found, name).values == tuple(values)
    peak = _quantity(found, "memory.peak_bytes")
    assert peak.deltas == tuple(a.memory.peak_bytes - answers[0].memory.peak_bytes for a in answers)
    at_peak = [q for q in found.answer if q.name.startswith("memory.at_peak.")]
    for i, answer in enumerate(answers):
        assert sum(int(q.values[i] or 0) for q in at_peak) == answer.memory.peak_bytes


def test_what_is_unknown_for_one_has_no_delta() -> None:
    found = compare(LORA, LORA.model_copy(update={"gpu": None}))
    assert _quantity(found, "cost.usd_total").values[1] is None
    assert _quantity(found, "cost.usd_total").deltas == (0, None)
    assert _quantity(found, "fit.verdict").deltas == (None, None)


def test_settings_differ_one_by_one_and_models_by_their_name() -> None:
    other = LORA.model_copy(update={"settings": {"method.lora_dropout": 0.1}})
    assert [(c.field, c.values) for c in compare(LORA, other).question] == [("set.method.lora_dropout", (None, 0.1))]
    bigger = compare(LORA, LORA.model_copy(update={"model": "llama-13b"}))
    assert [c.field for c in bigger.question] == ["model"]
    fewer = compare(LORA, LORA.model_copy(update={"settings": {"model.num_hidden_layers": 2}}))
    assert "set.model.num_hidden_layers" in [c.field for c in fewer.question]


def test_an_estimate_a_file_and_its_json_are_jobs(tmp_path: Path) -> None:
    answer = estimate(LORA)
    (tmp_path / "answer.json").write_text(answer.to_json())
    (tmp_path / "sft.yaml").write_text("model_name_or_path: llama-7b\nuse_peft: true\n")
    found = compare(answer, tmp_path / "answer.json", str(tmp_path / "sft.yaml"))
    assert found.names == ("llama-7b", str(tmp_path / "answer.json"), str(tmp_path / "sft.yaml"))
    assert found.jobs[0] == found.jobs[1]
    assert Comparison.model_validate_json(found.model_dump_json(by_alias=True)) == found


def test_a_file_at_two_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text("model: llama-7b\nmethod: qlora\nmicro_batch: 1\n")
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@example.org commit -qm a"):
        subprocess.run(["git", *command.split()], check=True, capture_output=True)
    Path("job.yaml").write_text("model: llama-7b\nmethod: qlora\nmicro_batch: 4\nbatching: exact\n")
    found = compare("job.yaml", base="HEAD")
    assert found.names == ("job.yaml at HEAD", "job.yaml")
    assert [(c.field, c.values) for c in found.question] == [("micro_batch", (1, 4))]
    Path("new.yaml").write_text("model: llama-7b\n")
    with pytest.raises(RequestError, match=r"new\.yaml: there is no such file at HEAD"):
        compare("new.yaml", base="HEAD")
    with pytest.raises(RequestError, match="unknown revision 'nope'"):
        compare("job.yaml", base="nope")
    with pytest.raises(RequestError, match="needs files"):
        compare(LORA, base="HEAD")


def test_one_job_is_not_a_comparison() -> None:
    with pytest.raises(RequestError, match="one job alone"):
        compare(LORA)
