"""A job becomes a folder: what is in it, what it says of itself, and what is refused before anything is written."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from peftplan import Run, estimate, export, trainers
from peftplan.arch.families import families
from peftplan.cli import main
from peftplan.errors import RequestError
from peftplan.exporter import smoke
from peftplan.job import Job

TRAINER = "axolotl"


def job(**fields: Any) -> Job:
    return Job(**{"model": "llama-7b", "rank": 16, "dtype": "bfloat16", "precision": "bf16-mixed", **fields})


def test_everything_is_there(tmp_path: Path) -> None:
    done = export(job(gpu="a100-80gb"), trainer=TRAINER, out=tmp_path / "run")
    there = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert there == set(done.files) >= {"README.md", "run.sh", "requirements.txt", "estimate.json"}
    assert done.command in (tmp_path / "run" / "README.md").read_text()
    assert all("==" in line for line in (tmp_path / "run" / "requirements.txt").read_text().splitlines())
    subprocess.run(["bash", "-n", tmp_path / "run" / "run.sh"], check=True)


def test_the_estimate_is_that_of_the_config_as_its_trainer_reads_it(tmp_path: Path) -> None:
    done = export(job(), trainer=TRAINER, out=tmp_path / "run")
    read = trainers.read_config(tmp_path / "run" / "axolotl.yaml")
    assert done.estimate is not None
    assert estimate(read).memory == done.estimate.memory
    saved = json.loads((tmp_path / "run" / "estimate.json").read_text())
    assert saved["memory"]["peak_bytes"] == done.estimate.memory.peak_bytes


@pytest.mark.parametrize(
    ("named", "written"),
    [
        ("llama-7b", "huggyllama/llama-7b"),
        ("vicuna-7b-v1.3", "lmsys/vicuna-7b-v1.3"),
        ("huggyllama/llama-7b", "huggyllama/llama-7b"),
    ],
)
def test_the_model_is_written_as_others_can_find_it(tmp_path: Path, named: str, written: str) -> None:
    assert export(job(model=named), trainer=TRAINER, out=tmp_path / "run").job.model == written


@pytest.mark.parametrize(("method", "package"), [("qlora", "bitsandbytes"), ("adamss", "scikit-learn")])
def test_what_is_needed_is_required(tmp_path: Path, method: str, package: str) -> None:
    fields: dict[str, Any] = {"method": method, "precision": "bf16-mixed"}
    export(job(**fields), trainer="hf_script", out=tmp_path / "run")
    assert package in (tmp_path / "run" / "requirements.txt").read_text()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(RequestError, match="not empty"):
        export(job(), trainer=TRAINER, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    export(job(), trainer=TRAINER, out=tmp_path, overwrite=True)
    assert (tmp_path / "mine").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model llama-7b --trainer axolot", "did you mean axolotl"),
        ("--model llama-7b --trainer axolotl --launcher slrm", "did you mean slurm"),
        (
            "--model llama-7b --trainer axolotl --method prompt_tuning --set method.num_virtual_tokens=8",
            "has no key for",
        ),
        ("--model llama-7b --trainer axolotl --place partion=a", "did you mean partition"),
        ("--model lama-7b", "unknown model"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    code = main(["export", *arguments.split(), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
    assert not (tmp_path / "run").exists()


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RequestError, match="file of that name"):
        export(job(), trainer=TRAINER, out=tmp_path / "run")


def test_a_launcher_starts_what_the_trainer_wrote(tmp_path: Path) -> None:
    done = export(job(), trainer=TRAINER, launcher="slurm", out=tmp_path / "run")
    assert "job.sbatch" in done.files
    assert "sbatch job.sbatch" in (tmp_path / "run" / "run.sh").read_text()


@pytest.mark.parametrize("model", ["llama-7b", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-2b", "phi-3-mini-4k", "smollm3-3b"])
def test_the_dry_run_keeps_the_architecture(model: str) -> None:
    full, tiny = (estimate(j) for j in (job(model=model, target_modules="all-linear"), _tiny(model)))
    assert tiny.parameters.total < full.parameters.total / 100
    assert (tiny.job.config or {})["model_type"] in families()
    assert tiny.parameters.trainable > 0


def _tiny(model: str) -> Job:
    return smoke.job_of(job(model=model, target_modules="all-linear"), trainers.get("trl"))


def test_the_dry_run_differs_where_it_says_so(tmp_path: Path) -> None:
    export(job(), trainer=TRAINER, out=tmp_path / "run", with_smoke=True, run=Run(dataset="rows.jsonl"))
    assert os.access(tmp_path / "run" / "smoke.sh", os.R_OK)
    full = trainers.read_config(tmp_path / "run" / "axolotl.yaml")
    tiny = trainers.read_config(tmp_path / "run" / "smoke" / "axolotl.yaml")
    assert (tiny.method, tiny.settings, tiny.optimizer) == (full.method, full.settings, full.optimizer)
    assert (tiny.model, tiny.rank, tiny.seq_len) == (smoke.MODEL, smoke.RANK, 64)


def test_the_best_of_a_plan_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = "plan --model smollm2-135m --gpu rtx-4090 --methods lora --attention sdpa --seq-len 256 --json --write"
    assert main([*request.split(), str(tmp_path / "run")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["written"]["files"]) >= {"sft.yaml", "run.sh", "README.md"}
    read = trainers.read_config(tmp_path / "run" / "sft.yaml")
    best = answer["best"]["job"]
    assert (read.micro_batch, read.grad_accum, read.rank) == (best["micro_batch"], best["grad_accum"], best["rank"])
    assert estimate(read.model_copy(update={"gpu": best["gpu"]})).fit.verdict == "fits"
