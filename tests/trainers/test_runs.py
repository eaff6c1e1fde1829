"""Written folders are trained with, for real, on the CPU: TRL and the transformers script.

The most used methods run with all tests; every other method, the folders' own commands and two processes run with
`-m trainers`. Nothing of a written file is changed: the job names the tiny model and the run says CPU and two steps,
and that this is all that differs from the file of a real model is tested here too.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftplan import estimate, methods, trainers
from peftplan.job import Job
from peftplan.trainers import Run
from tests.e2e import runs, venvs
from tests.e2e.overlay import differing
from tests.trainers import fixtures
from tests.trainers.conftest import Assets

pytestmark = [
    pytest.mark.trace,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL needs Python 3.11"),
]
COMMON = {"micro_batch": 2, "seq_len": 64, "backend": "cpu"}
HALF = {"dtype": "bf16", "precision": "bf16-mixed"}
QUICK: dict[str, tuple[str, dict[str, Any]]] = {
    "script-full": ("hf_script", {"method": "full"}),
    "script-lora": ("hf_script", {"method": "lora"}),
    "script-qlora": ("hf_script", {"method": "qlora"}),
    "script-dora": ("hf_script", {"method": "dora"}),
    "script-ia3": ("hf_script", {"method": "ia3"}),
    "script-prompt_tuning": ("hf_script", {"method": "prompt_tuning"}),
    "script-packed": ("hf_script", {"method": "lora", "batching": "packed", "recompute": "full"}),
    "script-adamw_8bit": ("hf_script", {"method": "lora", "optimizer": "adamw_8bit", "model": "wide-llama"}),
    "trl-full": ("trl", {"method": "full", **HALF}),
    "trl-lora": ("trl", {"method": "lora", **HALF}),
    "trl-qlora": ("trl", {"method": "qlora", **HALF}),
    "trl-packed": ("trl", {"method": "lora", "batching": "packed", "recompute": "full"}),
}
"""{name: (trainer, fields of the job)}."""
VARIANTS = ("rslora", "lora_plus", "pissa", "olora", "qdora")
NEEDS = {"adamss": "sklearn"}
"""What PEFT imports for a method without requiring it."""
RUNNABLE = tuple(
    name
    for name in methods.names()
    if trainers.support()[name]["hf_script"]
    and (name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None)
)
HALVED = ("adalora",)
"""What trains one number more where PEFT moves or casts its adapters, which it does not in fp32 on a CPU."""
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"script-{name}": ("hf_script", {"method": name, **(HALF if name in HALVED else {})})
        for name in (*RUNNABLE, *VARIANTS)
    },
    **{
        f"script-nf4-{name}": ("hf_script", {"method": name, "format": "nf4"})
        for name in ("ia3", "vera", "oft", "miss", "ln_tuning", "prompt_tuning", "lora_fa")
    },
    "script-int8": ("hf_script", {"method": "lora", "format": "int8"}),
    "script-exact": ("hf_script", {"method": "lora", "batching": "exact", "grad_accum": 2}),
    "script-paged_8bit": ("hf_script", {"method": "lora", "optimizer": "paged_adamw_8bit", "model": "wide-llama"}),
    "script-paged_adamw_32bit": ("hf_script", {"method": "lora", "optimizer": "paged_adamw_32bit"}),
    "script-fused": ("hf_script", {"method": "lora", "optimizer": "adamw_torch_fused"}),
    "trl-dora": ("trl", {"method": "dora", **HALF}),
    "trl-rslora": ("trl", {"method": "rslora", **HALF}),
    "trl-wrapped": ("trl", {"method": "lora", "batching": "exact"}),
    "trl-int8": ("trl", {"method": "lora", "format": "int8", **HALF}),
}
FITTING: dict[str, dict[str, Any]] = {
    "adalora": {"method.total_step": 8},
    "adaption_prompt": {"method.adapter_len": 4, "method.adapter_layers": 1},
    "c3a": {"method.block_size": 16},
    "road": {"method.group_size": 16},
    "shira": {"method.r": 4},
    "vblora": {"method.vector_length": 16},
    "waveft": {"method.n_frequency": 100},
    "trainable_tokens": {"method.token_indices": [5, 6]},
}
"""Settings of methods whose defaults do not fit or divide the tiny model's sizes, or that have none."""
SAVED_BESIDE = {
    "adalora": "PEFT saves the ranks that are left",
    "cartridge": "PEFT saves the frozen tokens beside the trained ones",
    "frod": "PEFT saves the frozen basis beside the trained cores",
    "delora": "PEFT saves the norms of the base's weights",
    "lora_fa": "PEFT saves A, which does not train, beside B",
    "p_tuning": "PEFT saves the virtual tokens, not the encoder that made them",
    "vera": "PEFT saves the frozen projections beside the trained vectors",
    "randlora": "PEFT saves the frozen bases beside the trained scalings",
    "pvera": "PEFT saves the frozen projections beside the trained vectors",
    "tinylora": "PEFT saves the frozen halves and projections beside the trained vectors",
    "glora": "PEFT saves zeros in place of the paths that are off",
    "supertuning": "PEFT saves where the trained values go beside them",
    "shira": "PEFT saves where the trained values go beside them",
    "adamss": "PEFT saves the frozen directions beside what trains",
    "lily": "PEFT saves what layers share once for each of them",
}
"""Methods whose saved adapter is not what trains, and why."""
WHOLE = ("full", "freeze", "bitfit")
"""Methods that save the whole model."""


@pytest.fixture(scope="module")
def models(assets: Assets, own_python: Path) -> Path:
    return assets(own_python)


def job_of(fields: Mapping[str, Any], models: Path, **more: Any) -> Job:
    """The job on a tiny model; one with biases where only they train."""
    method = fields["method"]
    model = fields.get("model", "tiny-qwen2" if method == "bitfit" else "tiny-llama")
    example = trainers.example(method, str(models / model))
    fitting = {"settings": FITTING[method]} if method in FITTING else {}
    return example.model_copy(update={**COMMON, **fitting, **fields, **more, "model": str(models / model)})


def write(folder: Path, job: Job, trainer: str, models: Path) -> str:
    """Writes what trains the job, and returns the command."""
    run = Run(dataset=str(models / "messages.jsonl"), max_steps=2, on_cpu=job.gpus == 1)
    made = trainers.write_folder(job, trainer=trainer, run=run)
    folder.mkdir()
    for name, text in made.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return made.command


def check(folder: Path, facts: runs.Facts, job: Job, trainer: str) -> None:
    """What was trained and saved is what peftplan says of the job as its config states it."""
    alone = {"gpus": 1, "layout": None}
    said = estimate(trainers.get(trainer).stated(job, Run()).model_copy(update={**alone, "recompute": None}))
    runs.assert_trained(facts, trainable=said.parameters.trainable)
    if job.method not in SAVED_BESIDE:
        pattern = "model*.safetensors" if job.method in WHOLE else "adapter_model*.safetensors"
        whole = job.method in WHOLE
        assert runs.saved_numel(folder / "out", pattern) == (said.parameters.total if whole else facts.trainable)
    packed = {"nf4": "Params4bit", "int8": "Int8Params"}.get(said.job.format or "")
    assert packed is None or facts.classes[packed] == 14
    assert facts.trainable_dtypes.keys() == {"bfloat16" if job.method == "full" and job.dtype else _adapter(said.job)}


def _adapter(job: Job) -> str:
    return "float32" if job.adapter_dtype == "auto" else job.adapter_dtype


def check_states(facts: runs.Facts, job: Job, trainer: str) -> None:
    """The optimizer's states are, to the byte, what peftplan says they are on one process."""
    said = estimate(trainers.get(trainer).stated(job, Run()))
    assert facts.optimizer_state_bytes == said.memory.at_peak["state"]


def train_all(cases: Mapping[str, tuple[str, Mapping[str, Any]]], home: Path, models: Path, python: Path) -> list[str]:
    """Trains every case in one warm process; what went wrong in which."""
    jobs = {name: job_of(fields, models) for name, (_, fields) in cases.items()}
    for name, job in jobs.items():
        write(home / name, job, cases[name][0], models)
    runs.train_warm([home / name for name in jobs], python=python)
    return [f"{name}: {why}" for name, job in jobs.items() if (why := _wrong(home / name, job, cases[name][0]))]


def _wrong(folder: Path, job: Job, trainer: str) -> str:
    try:
        facts = runs.trained(folder)
        check(folder, facts, job, trainer)
        if job.method != "lora_fa":  # priced as AdamW's, whose counters its own optimizer holds as numbers
            check_states(facts, job, trainer)
    except AssertionError as error:
        return str(error) or "a check failed"
    return ""


@pytest.mark.slow
def test_the_most_used_methods_train(tmp_path: Path, models: Path, own_python: Path) -> None:
    wrong = train_all(QUICK, tmp_path, models, own_python)
    assert not wrong, "\n".join(wrong)


@pytest.mark.trainers
@pytest.mark.parametrize("part", range(4))
def test_every_method_trains(part: int, tmp_path: Path, models: Path, own_python: Path) -> None:
    mine = {name: case for index, (name, case) in enumerate(sorted(OTHERS.items())) if index % 4 == part}
    wrong = train_all(mine, tmp_path, models, own_python)
    assert not wrong, "\n".join(wrong)


@pytest.mark.trainers
@pytest.mark.parametrize("trainer", ["trl", "hf_script"])
def test_the_folders_own_command_trains(trainer: str, tmp_path: Path, models: Path, own_python: Path) -> None:
    job = job_of({"method": "lora", **HALF}, models)
    command = write(tmp_path / "run", job, trainer, models)
    (facts,) = runs.train(tmp_path / "run", command, python=own_python)
    check(tmp_path / "run", facts, job, trainer)


SPREAD = [
    ("trl", "lora", "ddp"), ("trl", "full", "ddp"), ("trl", "lora", "fsdp"), ("trl", "full", "fsdp"),
    ("trl", "qlora", "fsdp"), ("hf_script", "lora", "fsdp"), ("hf_script", "full", "ddp"),
    ("hf_script", "ia3", "ddp"), ("hf_script", "dora", "fsdp"),
]  # fmt: skip


@pytest.mark.trainers
@pytest.mark.parametrize(("trainer", "method", "layout"), SPREAD, ids="-".join)
def test_two_processes_train(
    trainer: str, method: str, layout: str, tmp_path: Path, models: Path, own_python: Path
) -> None:
    job = job_of({"method": method, **HALF}, models, gpus=2, layout=layout)
    command = write(tmp_path / "run", job, trainer, models)
    ranks = runs.train(tmp_path / "run", command, python=own_python, processes=2)
    for facts in ranks:
        runs.assert_trained(facts, trainable=estimate(job_of({"method": method}, models)).parameters.trainable)
        assert (facts.world, facts.backend) == (2, "gloo")
        sharded = layout == "fsdp"
        assert facts.distributed_type == ("FSDP" if sharded else "MULTI_CPU")
        assert facts.classes.get("DTensor", 0) == (sum(facts.classes.values()) if sharded else 0)
    pattern = "model*.safetensors" if method == "full" else "adapter_model*.safetensors"
    assert runs.saved_numel(tmp_path / "run" / "out", pattern) == ranks[0].trainable


DEEPSPEED = [
    ("trl", "lora", "zero2", None),
    ("trl", "lora", "zero3", None),
    ("trl", "full", "zero3", "params+optimizer"),
    ("hf_script", "full", "zero2", "optimizer"),
]


@pytest.mark.trainers
@pytest.mark.parametrize(("trainer", "method", "layout", "offload"), DEEPSPEED)
def test_deepspeed_trains(
    trainer: str, method: str, layout: str, offload: str | None, tmp_path: Path, assets: Assets
) -> None:
    """The first of them builds DeepSpeed's kernels for the CPU, which takes a minute or more."""
    python = venvs.venv("deepspeed")
    models = assets(python)
    job = job_of({"method": method, **HALF}, models, gpus=2, layout=layout, offload=offload)
    command = write(tmp_path / "run", job, trainer, models)
    for facts in runs.train(tmp_path / "run", command, python=python, processes=2, timeout_seconds=580):
        runs.assert_trained(facts, trainable=estimate(job_of({"method": method}, models)).parameters.trainable)
        assert (facts.world, facts.backend, facts.distributed_type) == (2, "gloo", "DEEPSPEED")
        assert facts.optimizer_state_bytes <= 4 * facts.trainable + 64  # half of two fp32 states, and counters


OVERLAY = {
    "trl": {
        "model_name_or_path", "dataset_name", "datasets", "max_steps", "num_train_epochs", "use_cpu",
        "per_device_train_batch_size", "max_length",
    },
    "hf_script": {
        "model.name", "data.dataset", "arguments.max_steps", "arguments.num_train_epochs", "arguments.use_cpu",
        "arguments.per_device_train_batch_size", "data.seq_len",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_a_run_differs_from_a_real_one_by_model_data_length_and_device(name: str, models: Path) -> None:
    trainer, fields = QUICK[name]
    tiny = job_of(fields, models)
    real = tiny.model_copy(update={"model": "meta-llama/Llama-2-7b-hf", "dtype": tiny.dtype or "fp32", "seq_len": 4096})
    run = Run(dataset=str(models / "messages.jsonl"), max_steps=2, on_cpu=True)
    written = (trainers.get(trainer).config(job, run_of) for job, run_of in ((real, Run()), (tiny, run)))
    assert differing(*written) <= OVERLAY[trainer]


@pytest.mark.slow
def test_trls_parser_takes_what_real_configs_become(tmp_path: Path, own_python: Path) -> None:
    for path in fixtures.of("trl"):
        config = trainers.get("trl").config(trainers.read_config(path), Run(dataset="rows.jsonl"))
        (tmp_path / path.name).write_text(yaml.safe_dump(config))
        (tmp_path / f"misspelt-{path.name}").write_text(yaml.safe_dump({**config, "lora_rank": 8}))
    said = _objections([*map(str, sorted(tmp_path.iterdir()))], own_python)
    assert {Path(file).name for file, why in said.items() if why} == {f"misspelt-{p.name}" for p in fixtures.of("trl")}


def _objections(files: list[str], python: Path) -> dict[str, str | None]:
    script = Path(runs.__file__).with_name("parsers.py")
    done = subprocess.run([python, script, "trl", *files], check=True, capture_output=True, text=True)
    said: dict[str, str | None] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "zero2", "zero3"])
def test_accelerates_reader_takes_what_is_written(layout: str, tmp_path: Path) -> None:
    load = importlib.import_module("accelerate.commands.config.config_args").load_config_from_file
    job = Job(model="llama-7b", gpus=4, nodes=2, layout=layout, dtype="bf16", precision="bf16-mixed")
    path = tmp_path / "accelerate.yaml"
    path.write_text(trainers.write_folder(job, trainer="trl", run=Run()).files["accelerate.yaml"])
    read = load(str(path))
    assert (read.num_processes, read.num_machines, read.mixed_precision) == (8, 2, "bf16")
