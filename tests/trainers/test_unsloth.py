"""Unsloth: jobs written and read again, its own dry run, and steps through its Python interface."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftplan import trainers
from peftplan.errors import RequestError
from peftplan.job import Job, make_job
from peftplan.pipeline import estimate
from peftplan.trainers import Run
from tests.e2e.venvs import venv
from tests.trainers import trips

BASE: dict[str, Any] = {
    "model": "Qwen/Qwen2.5-7B", "dtype": "bfloat16", "precision": "bf16-mixed", "seq_len": 512, "micro_batch": 2,
    "optimizer": "adamw_8bit", "recompute": "full",
}  # fmt: skip
NF4 = {"format.double_quant": True, "format.prepare": False}
METHODS: tuple[dict[str, Any], ...] = (
    {"method": "full"},
    {"method": "lora", "rank": 16, "target_modules": ("q_proj", "v_proj")},
    {"method": "lora", "rank": 16, "target_modules": ("q_proj",), "format": "nf4", "set": NF4},
    {"method": "rslora", "rank": 4, "target_modules": ("down_proj",), "set": {"method.lora_alpha": 64}},
    {"method": "dora", "rank": 8, "target_modules": ("q_proj",)},
)
REST: tuple[dict[str, Any], ...] = ({"recompute": "none"}, {"batching": "packed", "grad_accum": 8})


def job(**fields: Any) -> Job:
    return make_job(**{**BASE, **fields})


@pytest.mark.parametrize(("method", "rest"), list(itertools.product(METHODS, REST)), ids=str)
def test_what_is_written_says_the_same(method: dict[str, Any], rest: dict[str, Any]) -> None:
    trips.there_and_back("unsloth", job(**{**method, **rest}))


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "ia3"},
        {"optimizer": "adamw"},
        {"dtype": "float16", "precision": "fp16"},
        {"format": "int8"},
        {"attention": "eager"},
        {"batching": "exact"},
        {"gpus": 2, "layout": "ddp"},
        {"kernels": "liger"},
        {"adapter_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_what_it_cannot_say_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        trainers.write_folder(job(**{"method": "lora", **fields}), trainer="unsloth", run=Run())


def test_what_is_priced_instead_is_said() -> None:
    path = next(path for path in trips.examples("unsloth") if path.stem == "qwen25-lora")
    why = {remark.what: remark.why for remark in trainers.read_config(path).remarks}
    assert not {"training.gradient_checkpointing", "kernels"} & why.keys()
    read = trainers.read_config(path)
    assert (read.optimizer, read.recompute, read.kernels) == ("adamw_8bit", "unsloth", "unsloth")


@pytest.mark.trainers
def test_its_own_parser_accepts_what_is_written(tmp_path: Path) -> None:
    program = venv("unsloth").with_name("unsloth")
    for number, fields in enumerate(METHODS):
        made = trainers.write_folder(job(**fields), trainer="unsloth", run=Run(dataset="rows.jsonl"))
        (tmp_path / f"{number}.yaml").write_text(made.files["unsloth.yaml"])
        command = [str(program), "train", "--config", f"{number}.yaml", "--dry-run"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        seen, written = yaml.safe_load(done.stdout), yaml.safe_load(made.files["unsloth.yaml"])
        assert {key: seen["training"][key] for key in written["training"]} == written["training"]
    wrong = made.files["unsloth.yaml"].replace("lora_rank", "lora_r").replace("batch_size", "batch_sise")
    (tmp_path / "wrong.yaml").write_text(wrong)
    command = [str(program), "train", "--config", "wrong.yaml", "--dry-run"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode != 0


@pytest.mark.trainers
def test_its_python_interface_trains_what_is_predicted(assets: Callable[[Path], Path], tmp_path: Path) -> None:
    """Its command line needs parts that come with its desktop program only."""
    python = venv("unsloth")
    tiny = assets(python)
    asked = job(method="lora", rank=8, target_modules=("q_proj", "v_proj", "down_proj"), seq_len=64)
    made = trainers.write_folder(asked, trainer="unsloth", run=Run(dataset=str(tiny / "messages.jsonl"), max_steps=3))
    (tmp_path / "unsloth.yaml").write_text(made.files["unsloth.yaml"])
    inside = Path(__file__).parent / "inside" / "for_unsloth.py"
    done = subprocess.run(
        [str(python), str(inside), "unsloth.yaml", str(tiny / "tiny-llama")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    seen = yaml.safe_load(done.stdout.splitlines()[-1])
    config = yaml.safe_load((tiny / "tiny-llama" / "config.json").read_text())
    assert seen["trainable"] == estimate(asked.model_copy(update={"config": config})).parameters.trainable
    assert seen["steps"] == 3
    assert seen["loss"] > 0
