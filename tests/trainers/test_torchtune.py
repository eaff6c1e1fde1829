"""torchtune: jobs written and read again, its recipes' configs, its own checks, and a run."""

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
from peftplan.trainers import Run, _torchtune
from peftplan.trainers.rules import flatten
from tests.e2e import runs
from tests.e2e.overlay import overlaid
from tests.e2e.venvs import venv
from tests.trainers import trips

CONFIGS = trips.examples("torchtune")
IN_ITS_VENV = Path(__file__).parent / "inside" / "for_torchtune.py"
BASE: dict[str, Any] = {
    "model": "meta-llama/Llama-3.1-8B", "dtype": "bfloat16", "precision": "bf16", "seq_len": 512, "batching": "exact",
}  # fmt: skip
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS: tuple[dict[str, Any], ...] = (
    {"target_modules": ("q_proj", "v_proj"), "rank": 16},
    {"target_modules": ALL, "set": {"method.lora_alpha": 32, "method.lora_dropout": 0.1}},
)
REST: tuple[dict[str, Any], ...] = (
    {"micro_batch": 2, "grad_accum": 4, "optimizer": "adamw_torch_fused"},
    {"batching": "packed", "optimizer": "paged_adamw_8bit", "model": "Qwen/Qwen2.5-7B-Instruct"},
)
JOBS: list[dict[str, Any]] = [
    {"method": method, "recompute": recompute, **({} if method == "full" else targets), **rest}
    for method, targets, recompute, rest in itertools.product(
        ("full", "lora", "dora", "qlora"), TARGETS, ("none", "full"), REST
    )
]


def job(**fields: Any) -> Job:
    knobs = {**BASE, **fields}
    if knobs.get("method") in ("qlora", "qdora"):
        knobs["set"] = {"format.prepare": False, **knobs.get("set", {})}
    return make_job(**knobs)


@pytest.mark.parametrize("fields", JOBS, ids=range(len(JOBS)))
def test_what_is_written_says_the_same(fields: dict[str, Any]) -> None:
    trips.there_and_back("torchtune", job(**fields))


def test_peft_word_for_all_linear_layers_is_spelled_out() -> None:
    written = trainers.get("torchtune").config(job(method="lora", target_modules="all-linear"), Run())
    assert written["model"]["lora_attn_modules"] == ["q_proj", "k_proj", "v_proj", "output_proj"]
    assert written["model"]["apply_lora_to_mlp"] is True


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "float16", "precision": "fp16"},
        {"precision": "bf16-mixed", "dtype": "float32"},
        {"method": "ia3"},
        {"method": "lora", "target_modules": ("gate_proj",)},
        {"method": "lora", "adapter_dtype": "float32"},
        {"format": "int8"},
        {"model": "microsoft/phi-2"},
        {"attention": "eager"},
        {"method": "dora", "model": "meta-llama/Llama-3.1-405B"},
    ],
    ids=str,
)
def test_what_it_cannot_say_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        trainers.write_folder(job(**{"method": "lora", **fields}), trainer="torchtune", run=Run())


def test_several_gpus_meet_through_an_endpoint() -> None:
    spread = job(method="lora", target_modules="all-linear", gpus=8, nodes=2, layout="fsdp")
    made = trainers.write_folder(spread, trainer="torchtune", run=Run())
    assert "--nnodes $NNODES --nproc-per-node $NPROC_PER_NODE" in made.command
    assert "--rdzv-endpoint $MASTER_ADDR:$MASTER_PORT lora_finetune_distributed" in made.command
    assert yaml.safe_load(made.files["tune.yaml"])["fsdp_cpu_offload"] is False


def test_what_is_priced_instead_is_said() -> None:
    path = next(path for path in CONFIGS if path.stem == "mistral-full")
    why = {remark.what: remark.why for remark in trainers.read_config(path).remarks}
    assert "loss._component_" not in why
    assert trainers.read_config(path).settings["loss.style"] == "chunked"
    assert "optimizer_in_bwd" not in why
    assert trainers.read_config(path).settings["optimizer.in_backward"] is True
    assert "enable_activation_offloading" not in why
    assert trainers.read_config(path).settings["recompute.offload"] is True


def test_a_misspelt_key_is_named() -> None:
    path = next(path for path in CONFIGS if path.stem == "llama2-lora")
    text = path.read_text().replace("lora_rank:", "lora_rnak:").replace("compile:", "compiel:")
    why = {remark.what: remark.why for remark in trainers.read_config(path, text=text).remarks}
    assert "did you mean model.lora_rank?" in why["model.lora_rnak"]
    assert "compiel" not in why  # false: it moves nothing


def test_the_checkpoints_name_decides_between_models_of_one_size() -> None:
    base, instruct = "meta-llama/Llama-3.1-8B", "Meta-Llama-3.1-8B-Instruct"
    built = _torchtune.by_model(base)
    assert built is not None
    assert _torchtune.model_in(f"checkpoints/{base}", built) == base
    assert _torchtune.model_in(f"/tmp/{instruct}/original/", built) == instruct
    assert _torchtune.model_in("/tmp/mine", built) == "meta-llama/Meta-Llama-3.1-8B-Instruct"


# -- in its own environment ------------------------------------------------------------------------------------


@pytest.mark.trainers
def test_its_own_checks_accept_every_model_and_example(tmp_path: Path) -> None:
    for built in _torchtune.MODELS:
        for method in ("full", "lora", "qlora", "dora"):
            if method == "dora" and built.builder in _torchtune.WITHOUT_DORA:
                continue
            targets = {} if method == "full" else {"target_modules": "all-linear"}
            made = trainers.write_folder(job(model=built.hub, method=method, **targets), trainer="torchtune", run=Run())
            (tmp_path / f"{built.builder}-{method}.yaml").write_text(made.files["tune.yaml"])
    for path in CONFIGS:
        written = trainers.get("torchtune").config(trainers.read_config(path), Run())
        (tmp_path / f"own-{path.stem}.yaml").write_text(yaml.safe_dump(written))
    command = [str(venv("torchtune")), str(IN_ITS_VENV), "validate", *map(str, tmp_path.glob("*.yaml"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = (tmp_path / "own-llama2-lora.yaml").read_text().replace("lora_rank", "lora_rnak")
    (tmp_path / "wrong.yaml").write_text(wrong)
    done = subprocess.run([*command[:3], str(tmp_path / "wrong.yaml")], capture_output=True, text=True, check=False)
    assert done.returncode != 0


TINY = {
    "vocab_size": 512, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 704,
    "max_seq_len": 512, "attn_dropout": 0.0,
}  # fmt: skip
TINY_CONFIG = {
    "model_type": "llama", "vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_size": 256, "intermediate_size": 704, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
MAY = {
    "model._component_", *(f"model.{key}" for key in TINY), "model.lora_dropout", "tokenizer.*", "checkpointer.*",
    "dataset.*", "device",
}  # fmt: skip


@pytest.mark.trainers
@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
def test_it_trains(method: str, tmp_path: Path) -> None:
    python = venv("torchtune")
    subprocess.run([str(python), str(IN_ITS_VENV), "tiny", str(tmp_path / "tiny")], check=True, capture_output=True)
    targets = {} if method == "full" else {"target_modules": "all-linear", "rank": 8}
    asked = job(model="meta-llama/Llama-2-7b-hf", method=method, dtype="float32", precision="fp32", seq_len=64,
                micro_batch=2, recompute="full", **targets)  # fmt: skip
    run = Run(dataset="rows.jsonl", max_steps=3, on_cpu=True)
    made = trainers.write_folder(asked, trainer="torchtune", run=run)
    written = yaml.safe_load(made.files["tune.yaml"])
    builder = "llama2" if method == "full" else "lora_llama2"
    changes = {
        "model._component_": f"torchtune.models.llama2.{builder}",
        **{f"model.{key}": value for key, value in TINY.items()},
        "tokenizer.path": "tiny/tokenizer.model",
        "checkpointer.checkpoint_dir": "tiny",
        "checkpointer.checkpoint_files": ["model.safetensors"],
        "checkpointer.checkpoint_files.filename_format": None,
        "checkpointer.checkpoint_files.max_filename": None,
        "dataset.data_files": "tiny/messages.jsonl",
    }
    if method != "full":
        changes["model.lora_dropout"] = 0.0
    may = {key for key in {*changes, *flatten(written)} if any(_covers(pattern, key) for pattern in MAY)}
    proof = overlaid(written, changes, may=may)
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(proof))
    (facts,) = runs.train(tmp_path, made.command, python=python)
    predicted = estimate(asked.model_copy(update={"config": TINY_CONFIG})).parameters.trainable
    runs.assert_trained(facts, trainable=predicted)
    if method != "full":
        assert runs.saved_numel(tmp_path / "out", "adapter_model*.safetensors") == predicted


def _covers(pattern: str, key: str) -> bool:
    return key == pattern or (pattern.endswith("*") and key.startswith(pattern[:-1]))
