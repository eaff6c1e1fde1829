"""AdapterHub's adapters: jobs written as scripts and read again, what it cannot say, and runs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftplan import trainers
from peftplan.errors import RequestError, Unsupported
from peftplan.job import Job, make_job
from peftplan.pipeline import estimate
from peftplan.trainers import Run
from peftplan.trainers.adapters import script
from tests.e2e import runs
from tests.e2e.overlay import overlaid
from tests.e2e.venvs import venv
from tests.trainers import trips

BASE: dict[str, Any] = {
    "model": "huggyllama/llama-7b", "dtype": "bfloat16", "precision": "bf16-mixed", "seq_len": 512, "micro_batch": 2,
}  # fmt: skip
LORA: dict[str, Any] = {"method": "lora", "rank": 8, "target_modules": ("q_proj", "v_proj")}
WIDE: dict[str, Any] = {
    "method": "lora", "rank": 4, "target_modules": ("q_proj", "k_proj", "v_proj", "down_proj", "up_proj"),
    "set": {"method.lora_alpha": 32, "method.lora_dropout": 0.1},
}  # fmt: skip
IA3: dict[str, Any] = {
    "method": "ia3", "target_modules": ("k_proj", "v_proj", "down_proj"), "set": {"method.feedforward_modules": ()},
}  # fmt: skip
PREFIX: dict[str, Any] = {"method": "prefix_tuning", "set": {"method.num_virtual_tokens": 8}}
OWN: dict[str, dict[str, Any]] = {
    "seq_bn": {"method": "seq_bn", "set": {"method.reduction_factor": {"0": 4, "default": 8}}},
    "pfeiffer": {"method": "pfeiffer", "set": {"method.init_weights": "mam_adapter"}},
    "houlsby": {"method": "houlsby", "set": {"method.non_linearity": "gelu", "method.dropout": 0.1}},
    "parallel": {"method": "scaled_parallel"},
    "compacter": {"method": "compacter++", "set": {"method.reduction_factor": 8}},
    "hub_lora": {"method": "hub_lora", "rank": 4, "set": {"method.intermediate_lora": True, "method.dropout": 0.1}},
    "hub_ia3": {
        "method": "hub_ia3",
        "dtype": "float32",
        "precision": "fp32",
        "set": {"method.attn_matrices": ["q", "k", "v"]},
    },
    "hub_prefix_tuning": {"method": "hub_prefix_tuning", "set": {"method.bottleneck_size": 24}},
    "hub_prefix_tuning_flat": {"method": "hub_prefix_tuning_flat", "set": {"method.prefix_length": 6}},
    "mam": {"method": "mam", "set": {"method.prefix_tuning": {"prefix_length": 9}}},
    "unipelt": {
        "method": "unipelt",
        "set": {"method.adapter": {"reduction_factor": 8}, "method.lora": {"r": 4, "attn_matrices": ["q", "k"]}},
    },
    "adapterdrop": {"method": "adapterdrop", "set": {"method.leave_out": [0]}},
}
FUSED: dict[str, Any] = {"method": "adapterfusion", "set": {"method.num_adapters": 2, "method.value": False}}
NF4: dict[str, Any] = {**LORA, "format": "nf4", "set": {"format.double_quant": True, "format.prepare": False}}


def job(**fields: Any) -> Job:
    return make_job(**{**BASE, **fields})


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("fields", [LORA, WIDE, IA3, NF4, {**LORA, "dtype": "float32", "precision": "fp32"}], ids=str)
def test_what_is_written_says_the_same(fields: dict[str, Any], recompute: str) -> None:
    trips.there_and_back("adapters", job(recompute=recompute, **fields))


@pytest.mark.parametrize("fields", [*OWN.values(), FUSED], ids=str)
def test_its_own_methods_say_the_same(fields: dict[str, Any]) -> None:
    trips.there_and_back("adapters", job(recompute="full", **fields))


def test_prefixes_are_written_without_checkpoints() -> None:
    trips.there_and_back("adapters", job(recompute="none", **PREFIX))


def test_its_script_is_known_and_read_without_running(tmp_path: Path) -> None:
    made = trainers.write_folder(job(**WIDE), trainer="adapters", run=Run(dataset="rows.jsonl"))
    path = tmp_path / "train.py"
    path.write_text(made.files["train.py"] + "\nraise SystemExit('run')\n")
    back = trainers.read_config(path)
    assert (back.trainer, back.rank, back.target_modules) == ("adapters", 4, WIDE["target_modules"])
    compile(made.files["train.py"], "train.py", "exec")


@pytest.mark.parametrize(
    "fields",
    [
        {**LORA, "target_modules": "all-linear"},
        {**LORA, "target_modules": ("o_proj",)},
        {"method": "ia3"},
        {"method": "vera"},
        {"method": "full"},
        {"method": "dora"},
        {"method": "prompt_tuning", "set": {"method.num_virtual_tokens": 8}},
        {**PREFIX, "set": {"method.num_virtual_tokens": 8, "method.prefix_projection": True}},
        {**LORA, "precision": "bf16"},
        {**LORA, "adapter_dtype": "bfloat16"},
        {**LORA, "format": "int8"},
        {**LORA, "gpus": 2, "layout": "ddp"},
    ],
    ids=str,
)
def test_what_it_cannot_say_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        trainers.write_folder(job(**fields), trainer="adapters", run=Run())


def test_who_can_is_named() -> None:
    with pytest.raises(Unsupported, match=r"can: .*hf_script"):
        trainers.write_folder(job(method="vera"), trainer="adapters", run=Run())


@pytest.mark.trainers
@pytest.mark.parametrize(
    "fields", [LORA, WIDE, IA3, PREFIX, NF4, *OWN.values()], ids=["lora", "wide", "ia3", "prefix", "nf4", *OWN]
)
def test_it_trains(fields: dict[str, Any], assets: Callable[[Path], Path], tmp_path: Path) -> None:
    facts = _trained(fields, assets, tmp_path, {})
    assert os.path.exists(tmp_path / "out" / "adapter_config.json")
    if fields is NF4:
        assert facts.classes["Params4bit"] == 14


@pytest.mark.trainers
def test_it_fuses(assets: Callable[[Path], Path], tmp_path: Path) -> None:
    python = venv("adapters")
    folders = [str(tmp_path / name) for name in ("first", "second")]
    model = str(assets(python) / "tiny-llama")
    subprocess.run([str(python), "-c", BEFORE, model, *folders], check=True)
    _trained(FUSED, assets, tmp_path, {"fusion.adapters": folders})
    assert (tmp_path / "out" / "adapter_fusion_config.json").is_file()


BEFORE = """
import sys, adapters
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
adapters.init(model)
for folder in sys.argv[2:]:
    model.add_adapter(folder.rpartition("/")[2], config="seq_bn")
    model.save_adapter(folder, folder.rpartition("/")[2])
"""
"""Adapters for a fusion to start from."""


def _trained(
    fields: dict[str, Any], assets: Callable[[Path], Path], folder: Path, changes: dict[str, Any]
) -> runs.Facts:
    """Three steps of the tiny model, which train what is predicted."""
    python = venv("adapters")
    tiny = assets(python)
    asked = job(**{**fields, "dtype": "float32", "precision": "fp32", "seq_len": 64})
    config = json.loads((tiny / "tiny-llama" / "config.json").read_text())
    asked = asked.model_copy(update={"config": config})
    written = trainers.get("adapters").config(asked, Run(dataset="rows.jsonl", max_steps=3, on_cpu=True))
    laid = {"model.name": str(tiny / "tiny-llama"), "data.dataset": str(tiny / "messages.jsonl"), **changes}
    (folder / "train.py").write_text(script(overlaid(written, laid, may=set(laid))))
    (facts,) = runs.train(folder, "python train.py", python=python)
    runs.assert_trained(facts, trainable=estimate(asked).parameters.trainable)
    assert set(facts.trainable_dtypes) == {"float32"}
    return facts
