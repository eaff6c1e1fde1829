"""Folders written for Axolotl, LLaMA-Factory and ms-swift: accepted by their parsers, and trained with on the CPU.

Each trainer has an environment of its own (`tests/e2e/venvs.py`); run with `-m trainers`. A run differs from the
written files by what `OVERLAY` declares: ms-swift cannot tell what a model without a name is.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml

from peftplan import estimate, trainers
from peftplan.job import Job
from peftplan.trainers import Run
from tests.e2e import runs
from tests.e2e.overlay import overlaid
from tests.e2e.venvs import venv
from tests.trainers import trips
from tests.trainers.conftest import Assets

pytestmark = pytest.mark.trainers
E2E = Path(runs.__file__).parent
NAMES = ("axolotl", "llamafactory", "swift")
COMMON = {"micro_batch": 2, "seq_len": 128, "grad_accum": 2, "attention": "sdpa", "backend": "cpu"}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "axolotl": {
        "full": {"method": "full"},
        "lora": {"method": "lora"},
        "qlora": {"method": "qlora"},
        "int8": {"method": "lora", "format": "int8"},
        "dora": {"method": "dora", "recompute": "full"},
        "bitfit": {"method": "bitfit"},
        "adamw_8bit": {"method": "lora", "optimizer": "adamw_8bit", "model": "wide-llama"},
    },
    "llamafactory": {
        "full": {"method": "full"},
        "freeze": {"method": "freeze", "set": {"method.layers": 1, "method.train": ("lm_head",)}},
        "lora": {"method": "lora"},
        "qlora": {"method": "qlora", "recompute": "full"},
        "dora": {"method": "dora"},
        "oft": {"method": "oft", "target_modules": "all-linear"},
        "pissa": {"method": "pissa"},
    },
    "swift": {
        "full": {"method": "full"},
        "lora": {"method": "lora"},
        "qlora": {"method": "qlora", "recompute": "full"},
        "dora": {"method": "dora"},
        "ia3": {"method": "ia3"},
        "fourierft": {"method": "fourierft", "target_modules": "all-linear", "set": {"method.n_frequency": 50}},
        "boft": {"method": "boft", "target_modules": "all-linear"},
        "vera": {"method": "vera", "target_modules": ("v_proj",), "rank": 16},
        "bitfit": {"method": "bitfit"},
    },
}
OVERLAY: dict[str, dict[str, Any]] = {
    "axolotl": {},
    "llamafactory": {},
    "swift": {"check_model": False, "model_type": "qwen2", "template": "qwen2_5"},
}
QUIET = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "PEFTPLAN_CPU_ACCEL": "1", "MODELSCOPE_CACHE": "cache"}
ONE_NODE = {"NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
WHOLE = ("full", "freeze", "bitfit")


def job_of(fields: Mapping[str, Any], models: Path, **more: Any) -> Job:
    model = str(models / fields.get("model", "tiny-qwen2"))
    return Job.model_validate({**COMMON, **fields, **more, "model": model})


def write(folder: Path, job: Job, name: str, models: Path) -> str:
    """Writes what trains the job, with the overlay on it, and returns the command."""
    run = Run(dataset=str(models / "messages.jsonl"), max_steps=2, on_cpu=job.gpus == 1)
    made = trainers.write_folder(job, trainer=name, run=run)
    folder.mkdir()
    for file, text in made.files.items():
        (folder / file).write_text(text, encoding="utf-8")
    main = folder / f"{name}.yaml"
    proof = overlaid(yaml.safe_load(main.read_text()), OVERLAY[name], may=OVERLAY[name])
    main.write_text(yaml.safe_dump(proof), encoding="utf-8")
    return made.command


def train(folder: Path, job: Job, name: str, models: Path) -> list[runs.Facts]:
    nodes = {} if job.gpus == 1 else {**ONE_NODE, "NPROC_PER_NODE": str(job.gpus), "PATH": _with_torchrun(name)}
    return runs.train(
        folder,
        Template(write(folder, job, name, models)).safe_substitute(nodes),
        python=venv(name),
        processes=job.gpus,
        extra_path=[E2E / "stubs"],
        environment={**QUIET, **nodes},
        timeout_seconds=400,
    )


def _with_torchrun(name: str) -> str:
    """torch lies in another environment: its script would start that one's interpreter."""
    return os.pathsep.join((str(venv(name).parent), str(E2E / "stubs" / "bin"), os.environ["PATH"]))


@pytest.mark.parametrize("name", NAMES)
def test_its_methods_train(name: str, tmp_path: Path, assets: Assets) -> None:
    models = assets(venv(name))
    jobs = {case: job_of(fields, models) for case, fields in METHODS[name].items()}
    for case, job in jobs.items():
        write(tmp_path / case, job, name, models)
    folders = [tmp_path / case for case in jobs]
    runs.train_warm(folders, python=venv(name), extra_path=[E2E / "stubs"], environment=QUIET)
    wrong = {case: found for case, job in jobs.items() if (found := wrong_with(tmp_path / case, job, name))}
    assert wrong == {}


def wrong_with(folder: Path, job: Job, name: str) -> str | None:
    try:
        check(folder, runs.trained(folder), job, name)
    except AssertionError as error:
        return str(error)
    return None


def check(folder: Path, facts: runs.Facts, job: Job, name: str) -> None:
    """What was trained and saved is what peftplan says of the job as its config states it."""
    stated = trainers.get(name).stated(job, Run())
    said = estimate(stated)
    runs.assert_trained(facts, trainable=said.parameters.trainable)
    assert facts.optimizer_state_bytes == said.memory.at_peak["state"]
    packed = {"nf4": "Params4bit", "int8": "Int8Params"}.get(said.job.format or "")
    assert packed is None or facts.classes[packed] == 14
    assert facts.checkpointing == (stated.recompute == "full")
    if job.method != "vera":  # PEFT saves the frozen projections beside the trained vectors
        saved = runs.saved_numel(folder / "out", _saved(job))
        assert saved == (said.parameters.total if job.method in WHOLE else facts.trainable)


@pytest.mark.parametrize("name", NAMES)
def test_the_folders_own_command_trains(name: str, tmp_path: Path, assets: Assets) -> None:
    models = assets(venv(name))
    job = job_of({"method": "lora"}, models)
    (facts,) = train(tmp_path / "run", job, name, models)
    check(tmp_path / "run", facts, job, name)


def _saved(job: Job) -> str:
    return "model*.safetensors" if job.method in WHOLE else "adapter_model*.safetensors"


SPREAD = [("llamafactory", "ddp"), ("llamafactory", "fsdp"), ("swift", "ddp"), ("swift", "fsdp")]


@pytest.mark.parametrize(("name", "layout"), SPREAD, ids=map("-".join, SPREAD))
def test_two_processes_train(name: str, layout: str, tmp_path: Path, assets: Assets) -> None:
    """Not Axolotl: several processes of it ask torch for an accelerator's device."""
    models = assets(venv(name))
    job = job_of({"method": "lora"}, models, gpus=2, layout=layout)
    alone = job.model_copy(update={"gpus": 1, "layout": None})
    said = estimate(trainers.get(name).stated(alone, Run()))
    for facts in train(tmp_path / "run", job, name, models):
        runs.assert_trained(facts, trainable=said.parameters.trainable)
        assert facts.world == 2
        assert facts.classes.get("DTensor", 0) == (sum(facts.classes.values()) if layout == "fsdp" else 0)


@pytest.mark.parametrize("name", NAMES)
def test_its_parser_accepts_the_examples_written_back(name: str, tmp_path: Path, assets: Assets) -> None:
    """Examples for DeepSpeed want a package that no environment here has: their keys are checked against the list."""
    models, files = assets(venv(name)), []
    for path in trips.examples(name):
        job = trainers.read_config(path)
        if str(job.layout).startswith("zero"):
            continue
        config = trainers.get(name).config(job, Run(dataset=str(models / "messages.jsonl")))
        config["base_model" if name == "axolotl" else "model_name_or_path" if name == "llamafactory" else "model"] = (
            str(models / "tiny-qwen2")
        )
        config |= OVERLAY[name] | {"output_dir": str(tmp_path / "out")}
        files.append(tmp_path / path.name)
        files[-1].write_text(yaml.safe_dump(config), encoding="utf-8")
    assert {key: why for key, why in objections(name, files).items() if why} == {}


@pytest.mark.parametrize("name", ["llamafactory", "swift"])
def test_its_parser_refuses_a_misspelt_key(name: str, tmp_path: Path, assets: Assets) -> None:
    """Axolotl accepts every key: there the list of known ones is what finds it."""
    models = assets(venv(name))
    write(tmp_path / "run", job_of({"method": "lora"}, models), name, models)
    main = tmp_path / "run" / f"{name}.yaml"
    main.write_text(main.read_text() + "lora_rnk: 8\n")
    (why,) = objections(name, [main]).values()
    assert "lora_rnk" in str(why)


def objections(name: str, files: list[Path]) -> dict[str, str | None]:
    """What the trainer's own parser says of each file."""
    environment = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(E2E / "stubs"), **QUIET}
    command = [str(venv(name)), str(E2E / "parsers.py"), name, *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str | None] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
