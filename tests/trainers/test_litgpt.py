"""LitGPT: jobs written and read again, what it published of its own configs, its own parser, and a run."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftplan import trainers
from peftplan.errors import RequestError
from peftplan.job import Job, make_job
from peftplan.pipeline import estimate
from peftplan.trainers import Run
from tests.e2e import runs
from tests.e2e.overlay import overlaid
from tests.e2e.venvs import venv
from tests.trainers import trips

IN_ITS_VENV = Path(__file__).parent / "inside" / "for_litgpt.py"
BASE: dict[str, Any] = {
    "model": "meta-llama/Llama-3.1-8B", "dtype": "bfloat16", "precision": "bf16", "seq_len": 512, "batching": "exact",
    "recompute": "none",
}  # fmt: skip
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS: tuple[dict[str, Any], ...] = (
    {"target_modules": ("q_proj", "v_proj"), "rank": 16},
    {"target_modules": (*ALL, "lm_head"), "set": {"method.lora_alpha": 32, "method.lora_dropout": 0.1}},
)
PRECISIONS: tuple[dict[str, Any], ...] = (
    {"micro_batch": 2, "grad_accum": 4, "optimizer": "adamw_torch_fused"},
    {"dtype": "float32", "precision": "bf16-mixed", "micro_batch": 1},
)
JOBS: list[dict[str, Any]] = [
    {"method": method, **({} if method == "full" else targets), **rest}
    for method, targets, rest in itertools.product(("full", "lora"), TARGETS, PRECISIONS)
]
QUANTIZED: tuple[dict[str, Any], ...] = (
    {"format": "nf4", "set": {"format.double_quant": True}},
    {"format": "fp4", "set": {"format.double_quant": False}},
    {"format": "int8"},
)


def job(**fields: Any) -> Job:
    return make_job(**{**BASE, **fields})


@pytest.mark.parametrize("fields", JOBS, ids=range(len(JOBS)))
def test_what_is_written_says_the_same(fields: dict[str, Any]) -> None:
    trips.there_and_back("litgpt", job(**fields))


@pytest.mark.parametrize("fields", QUANTIZED, ids=str)
def test_quantized_bases_train_with_paged_states(fields: dict[str, Any]) -> None:
    settings = {**fields.get("set", {}), **({} if fields["format"] == "int8" else {"format.prepare": False})}
    asked = job(method="lora", target_modules=ALL, **{**fields, "set": settings})
    if fields["format"] != "int8":
        trips.there_and_back("litgpt", asked)
    back = trainers.get("litgpt").stated(asked, Run())
    assert (back.optimizer, back.settings["optimizer.is_paged"]) == ("adamw_8bit", True)
    with pytest.raises(RequestError):
        trainers.write_folder(asked.model_copy(update={"optimizer": "adamw"}), trainer="litgpt", run=Run())


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "dora"},
        {"method": "ia3"},
        {"method": "lora", "target_modules": ("gate_proj",)},
        {"recompute": "full"},
        {"batching": "packed"},
        {"precision": "bf16-mixed"},
        {"attention": "eager"},
        {"adapter_dtype": "float32"},
        {"format": "nf4", "gpus": 2, "layout": "fsdp"},
        {"optimizer": "adamw_8bit"},
        {"layout": "zero3", "gpus": 2},
    ],
    ids=str,
)
def test_what_it_cannot_say_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        trainers.write_folder(job(**{"method": "lora", **fields}), trainer="litgpt", run=Run())


def test_several_gpus_are_started_by_torchrun_and_checkpoint_every_block() -> None:
    spread = job(method="lora", target_modules=ALL, gpus=8, nodes=2, micro_batch=2, grad_accum=4, recompute="full")
    made = trainers.write_folder(spread, trainer="litgpt", run=Run())
    assert made.command.startswith("torchrun --nnodes $NNODES --node-rank $NODE_RANK")
    assert made.command.endswith("-m litgpt finetune_lora --config litgpt.yaml")
    written = yaml.safe_load(made.files["litgpt.yaml"])
    assert (written["devices"], written["num_nodes"], written["train"]["global_batch_size"]) == (8, 2, 128)
    back = trainers.get("litgpt").read(written, name="back")
    assert (back.gpus, back.nodes, back.layout, back.recompute, back.grad_accum) == (8, 2, "fsdp", "full", 4)


PUBLISHED = {"llama2-lora": 19.77e9, "llama3-lora": 19.73e9, "llama32-3b-lora": 9.67e9, "mistral-lora": 20.66e9}
"""Peaks of one A10G: Lightning-AI/litgpt, config_hub/finetune/README.md, 26857050f, 2026-06-29."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_own_measurements_are_met(name: str) -> None:
    """Within 4 %, though LitGPT has models of its own."""
    path = next(path for path in trips.examples("litgpt") if path.stem == name)
    predicted = estimate(trainers.read_config(path)).memory.peak_bytes
    assert abs(predicted / PUBLISHED[name] - 1) < 0.04, predicted


def test_what_is_not_said_is_litgpts_default() -> None:
    silent = trainers.get("litgpt").read(
        {"checkpoint_dir": "checkpoints/meta-llama/Llama-2-7b-hf", "lora_r": 4}, name="x"
    )
    assert (silent.model, silent.rank, silent.target_modules) == ("meta-llama/Llama-2-7b-hf", 4, ("q_proj", "v_proj"))
    assert (silent.micro_batch, silent.grad_accum, silent.dtype, silent.precision) == (1, 16, "float32", "bf16-mixed")
    assert "longest of the data" in next(r.why for r in silent.remarks if r.what == "train.max_seq_length")


def test_what_litgpt_itself_refuses_is_refused() -> None:
    litgpt = trainers.get("litgpt")
    with pytest.raises(RequestError, match="not mixed"):
        litgpt.read({"checkpoint_dir": "llama-7b", "quantize": "bnb.nf4"}, name="x")
    with pytest.raises(RequestError, match="less than one micro-batch"):
        litgpt.read({"checkpoint_dir": "llama-7b", "train": {"micro_batch_size": 32}}, name="x")


# -- in its own environment ------------------------------------------------------------------------------------


@pytest.mark.trainers
@pytest.mark.parametrize("path", trips.examples("litgpt")[:3], ids=lambda path: path.stem)
def test_its_own_parser_accepts_what_is_written(path: Path, tmp_path: Path) -> None:
    written = trainers.get("litgpt").config(trainers.read_config(path), Run(dataset="rows.json"))
    recipe = "finetune_lora" if "lora_r" in written else "finetune_full"
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(written))
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**written, "lora_rnak": 8}))
    command = [str(venv("litgpt")), "-m", "litgpt", recipe, "--print_config", "--config"]
    done = subprocess.run([*command, "x.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert yaml.safe_load(done.stdout)["train"]["max_seq_length"] == written["train"]["max_seq_length"]
    done = subprocess.run([*command, "wrong.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0


TINY_CONFIG = {
    "model_type": "llama", "vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 176, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.trainers
@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_trains(method: str, tmp_path: Path) -> None:
    python = venv("litgpt")
    subprocess.run([str(python), str(IN_ITS_VENV), str(tmp_path / "tiny")], check=True, capture_output=True)
    targets = {} if method == "full" else {"target_modules": (*ALL, "lm_head"), "rank": 8}
    asked = job(model="meta-llama/Llama-2-7b-hf", method=method, dtype="float32", precision="fp32", seq_len=64,
                micro_batch=2, **targets)  # fmt: skip
    made = trainers.write_folder(asked, trainer="litgpt", run=Run(dataset="tiny/alpaca.json", max_steps=3, on_cpu=True))
    proof = overlaid(yaml.safe_load(made.files["litgpt.yaml"]), {"checkpoint_dir": "tiny"}, may={"checkpoint_dir"})
    (tmp_path / "litgpt.yaml").write_text(yaml.safe_dump(proof))
    (facts,) = runs.train(tmp_path, made.command, python=python)
    predicted = estimate(asked.model_copy(update={"config": TINY_CONFIG})).parameters.trainable
    runs.assert_trained(facts, trainable=predicted)
    saved = "lit_model.pth.lora" if method == "lora" else "lit_model.pth"
    count = [str(python), str(IN_ITS_VENV), "count", str(tmp_path / "out" / "final" / saved)]
    assert int(subprocess.run(count, check=True, capture_output=True, text=True).stdout) == predicted
