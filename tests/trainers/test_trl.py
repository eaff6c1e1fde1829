"""TRL: what `trl sft` understands, read into jobs and written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings

from peftplan import estimate, trainers
from peftplan.errors import RequestError, Unsupported
from peftplan.job import Job
from peftplan.trainers import Run
from peftplan.trainers._optimizers import WORDS, meaning
from peftplan.trainers.rules import flatten
from tests.trainers import fixtures
from tests.trainers.spread import MODEL, jobs
from tests.trainers.trips import expressible, there_and_back, unknown_keys


def read(**config: object) -> Job:
    return trainers.get("trl").read({"model_name_or_path": MODEL, **config}, name="x.yaml")


def why(job: Job, what: str) -> str:
    """The remark on one key."""
    return next(remark.why for remark in job.remarks if remark.what == what)


@given(jobs())
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_back(job: Job) -> None:
    if expressible("trl", job):
        there_and_back("trl", job)


@given(jobs())
@settings(max_examples=50, deadline=None)
def test_only_keys_of_the_pinned_version_are_written(job: Job) -> None:
    if expressible("trl", job):
        assert unknown_keys("trl", trainers.get("trl").config(job, Run())) == set()


def test_silence_means_trls_defaults() -> None:
    job = read()
    assert (job.method, job.dtype, job.precision) == ("full", "float32", "bf16-mixed")
    assert (job.micro_batch, job.seq_len, job.batching, job.recompute) == (8, 1024, "padded", "full")
    assert (job.optimizer, job.settings["optimizer.impl"]) == ("adamw", "fused")
    assert job.settings["loss.style"] == "fused_head"
    assert why(job, "seq_len") == "TRL's default"
    lora = read(use_peft=True)
    assert (lora.method, lora.rank, lora.settings["method.lora_dropout"]) == ("lora", 16, 0.05)


def test_every_default_that_moves_memory_is_written_over() -> None:
    config = trainers.get("trl").config(Job(model=MODEL), Run())
    assert config["lora_dropout"] == 0.0
    assert config["dtype"] == "float16"
    assert (config["bf16"], config["gradient_checkpointing"], config["optim"]) == (False, False, "adamw_torch")
    assert config["model_name_or_path"] == "huggyllama/llama-7b"  # what the Hub calls it


def test_a_quantized_base_is_not_prepared_and_its_adapter_is_bf16() -> None:
    job = read(use_peft=True, load_in_4bit=True, dtype="bfloat16")
    assert (job.format, job.adapter_dtype) == ("nf4", "bfloat16")
    assert job.settings["format.prepare"] is False
    assert job.settings["format.compute_dtype"] == "bfloat16"
    assert job.settings["format.double_quant"] is False
    with pytest.raises(RequestError, match="auto is no compute dtype"):
        read(use_peft=True, load_in_4bit=True, dtype="auto")
    with pytest.raises(Unsupported, match="adapter_dtype=float32"):
        trainers.write_folder(Job(model=MODEL, method="qlora", adapter_dtype="float32"), trainer="trl", run=Run())


@pytest.mark.parametrize(
    ("keys", "batching"),
    [
        ({}, "padded"),
        ({"per_device_train_batch_size": 1}, "exact"),
        ({"packing": True}, "packed"),
        ({"packing": True, "packing_strategy": "wrapped"}, "exact"),
        ({"padding_free": True}, "packed"),
    ],
)
def test_batching(keys: dict[str, object], batching: str) -> None:
    assert read(**keys).batching == batching


@pytest.mark.parametrize("optim", ["adamw_torch_xla", "adamw_torch_npu_fused"])
def test_an_optimizer_without_a_model_is_stood_in_for(optim: str) -> None:
    job = read(optim=optim)
    assert "not modelled; priced as optimizer adamw" in why(job, "optim")
    assert trainers.get("trl").config(job, Run())["optim"] == optim
    changed = job.model_copy(update={"optimizer": "paged_adamw_32bit", "settings": {}})
    assert trainers.get("trl").config(changed, Run())["optim"] == "paged_adamw_32bit"


def test_every_optimizer_of_transformers_is_read_and_written() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    for known in training_args.OptimizerNames:
        job = read(optim=known.value)
        written = trainers.get("trl").config(job, Run())["optim"]
        assert meaning(written) == meaning(known.value) if known.value in WORDS else written == known.value


def test_an_optimizers_arguments_are_settings() -> None:
    said = {"optim": "galore_adamw", "optim_args": "rank=64, update_proj_gap=50, scale=0.5"}
    job = read(**said, optim_target_modules=["self_attn", "mlp"])
    assert job.optimizer == "galore"
    assert job.settings["optimizer.rank"] == 64
    assert job.settings["optimizer.optim_target_modules"] == ("self_attn", "mlp")
    written = trainers.get("trl").config(job, Run())
    assert written["optim"] == "galore_adamw"
    assert written["optim_args"] == "rank=64,update_proj_gap=50"
    assert written["optim_target_modules"] == ["self_attn", "mlp"]


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "galore", "rank": 32},
        {"method": "apollo"},
        {"method": "lomo"},
        {"optimizer": "apollo_mini", "method": "full"},
        {"optimizer": "sgd", "method": "full", "set": {"optimizer.momentum": 0.9}},
        {"optimizer": "paged_lion_8bit"},
        {"optimizer": "adamw_torch_4bit"},
    ],
)
def test_optimizers_there_and_back(fields: dict[str, Any]) -> None:
    there_and_back("trl", Job(model="llama-7b", micro_batch=2, **fields))


@pytest.mark.parametrize("name", ["axolotl", "hf_script", "llamafactory", "swift"])
def test_other_trainers_of_transformers_say_them_too(name: str) -> None:
    there_and_back(name, Job(model="llama-7b", micro_batch=2, method="full", optimizer="adafactor"))


def test_what_transformers_has_no_word_for_is_refused() -> None:
    for optimizer in ("muon", "adam_mini", "deepspeed_cpu_adam"):
        with pytest.raises(Unsupported, match=optimizer):
            trainers.write_folder(Job(model="llama-7b", optimizer=optimizer), trainer="trl", run=Run())


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"neftune_noise_alpha": 5}, "errs low"),
        ({"max_length": None}, "errs low"),
        ({"label_smoothing_factor": 0.1}, "either way"),
        ({"gradient_chekpointing": True}, "did you mean gradient_checkpointing?"),
        ({"ddp_bucket_cap_mb": 25}, "not priced"),
    ],
)
def test_what_is_not_priced_is_named_and_kept(keys: dict[str, object], says: str) -> None:
    job = read(**keys)
    (key,) = flatten(keys)
    assert says in why(job, key)
    assert flatten(trainers.get("trl").config(job, Run()))[key] == flatten(keys)[key]


def test_harmless_keys_are_kept_without_a_word() -> None:
    job = read(dataset_name="imdb", warmup_ratio=0.1, report_to="wandb", save_strategy="epoch")
    assert not {remark.what for remark in job.remarks} & {"dataset_name", "warmup_ratio", "report_to", "save_strategy"}
    assert trainers.get("trl").config(job, Run())["dataset_name"] == "imdb"
    assert "dataset_name" not in trainers.get("trl").config(job, Run(dataset="rows.jsonl"))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"beta": 0.1}, "only `trl sft` is modelled"),
        ({"optim": "sgdd"}, "not an optimizer of transformers"),
        ({"dtype": "float8"}, "known: auto, float32"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "contradict"),
        ({"attn_implementation": "magic"}, "attn_implementation: 'magic' is not read"),
    ],
)
def test_mistakes_name_the_file_and_the_key(keys: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        read(**keys)
    assert str(caught.value).startswith("x.yaml: ")


@pytest.mark.parametrize(
    "job",
    [
        Job(model=MODEL, method="pissa"),
        Job(model=MODEL, method="ia3"),
        Job(model=MODEL, method="lora_plus"),
        Job(model=MODEL, format="int8", gpus=2, layout="fsdp"),
        Job(model=MODEL, gpus=2, layout="tp=2"),
        Job(model=MODEL, micro_batch=1, batching="padded"),
        Job(model=MODEL, optimizer="adamw_for_loop"),
    ],
    ids=lambda job: f"{job.method}-{job.layout}-{job.format}",
)
def test_what_trl_has_no_key_for_is_refused(job: Job) -> None:
    with pytest.raises(Unsupported, match=r"TRL has no key for .*; can: "):
        trainers.write_folder(job, trainer="trl", run=Run())


@pytest.mark.parametrize("path", fixtures.of("trl"), ids=lambda path: path.stem)
def test_real_configs_are_read_priced_and_written_back(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# source: ")
    job = trainers.read_config(path)
    assert estimate(job).memory.peak_bytes > 2**30
    config = trainers.get("trl").config(job, Run())
    stated = {
        trainers.get("trl").renamed.get(key, key): value for key, value in yaml.safe_load(path.read_text()).items()
    }
    assert {key: config[key] for key in stated} == {**stated, **_RESPELT.get(path.stem, {})}
    assert trainers.get("trl").read(config, name="written").model_dump(exclude={"remarks", "extras"}) == job.model_dump(
        exclude={"remarks", "extras"}
    )


_RESPELT = {"smollm3_sft": {"packing_strategy": "bfd"}}
"""`ffd` is what `bfd` was called before, and packs the same."""


def test_several_gpus_write_accelerates_file() -> None:
    job = Job(model=MODEL, method="qlora", dtype="bf16", precision="bf16-mixed", gpus=4, nodes=2, layout="fsdp")
    folder = trainers.write_folder(job, trainer="trl", run=Run(dataset="rows.jsonl"))
    beside, config = yaml.safe_load(folder.files["accelerate.yaml"]), yaml.safe_load(folder.files["sft.yaml"])
    assert (beside["num_processes"], beside["num_machines"], beside["mixed_precision"]) == (8, 2, "bf16")
    assert config["bnb_4bit_quant_storage"] == "bfloat16"  # FSDP would leave uint8 whole on every GPU
    assert beside["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] is False
    assert "--machine_rank" in folder.command
    assert config["datasets"] == [{"path": "json", "data_files": "rows.jsonl", "split": "train"}]
    assert "dataset_name" not in config
    assert trainers.get("trl").stated(job, Run()).gpus == 4
