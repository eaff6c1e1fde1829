"""PEFT's own config files become jobs: written by PEFT here, read by us, every knob understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftplan import adapter_config, estimate
from peftplan.cli.options import JobOptions
from peftplan.errors import BadFile, Unsupported

CONFIGS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "use_dora": True},
    "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "VeraConfig": {"r": 16, "target_modules": ["q_proj", "o_proj"]},
    "LoHaConfig": {"r": 4, "target_modules": ["q_proj"]},
    "LoKrConfig": {"r": 4, "target_modules": ["q_proj"]},
    "OFTConfig": {"oft_block_size": 32, "target_modules": ["q_proj"]},
    "MissConfig": {"r": 4, "target_modules": ["q_proj"]},
    "LNTuningConfig": {},
    "PromptTuningConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 8},
    "AdaptionPromptConfig": {"task_type": "CAUSAL_LM", "adapter_len": 8, "adapter_layers": 4},
    "CartridgeConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 8, "num_frozen_tokens": 2},
    "CPTConfig": {"task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2, 3, 4], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "PrefixTuningConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 8},
    "PromptEncoderConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 8},
    "MultitaskPromptTuningConfig": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 8, "num_tasks": 3},
    "HRAConfig": {"r": 4, "target_modules": ["q_proj"]},
    "FourierFTConfig": {"n_frequency": 100, "target_modules": ["q_proj"]},
    "DeloraConfig": {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}},
    "GraloraConfig": {"r": 4, "target_modules": ["q_proj"]},
    "C3AConfig": {"block_size": 64, "target_modules": ["q_proj"]},
    "RoadConfig": {"variant": "road_2", "target_modules": ["q_proj"]},
    "RandLoraConfig": {"r": 32, "target_modules": ["q_proj"]},
    "HiraConfig": {"r": 4, "target_modules": ["q_proj"]},
    "BeftConfig": {"target_modules": ["v_proj"]},
    "PveraConfig": {"r": 16, "target_modules": ["q_proj"]},
    "VBLoRAConfig": {"r": 4, "target_modules": ["q_proj"]},
    "BOFTConfig": {"boft_block_size": 4, "target_modules": ["q_proj"]},
    "DeftConfig": {"r": 4, "target_modules": ["q_proj"]},
    "PeanutConfig": {"r": 4, "target_modules": ["q_proj"]},
    "UniLoraConfig": {"r": 4, "target_modules": ["q_proj"]},
    "SupertuningConfig": {"sparsity": 0.9, "target_modules": ["q_proj"]},
    "LilyConfig": {"r": 4, "target_modules": ["q_proj"]},
    "TinyLoraConfig": {"r": 2, "target_modules": ["q_proj"]},
    "GloraConfig": {"r": 4, "target_modules": ["q_proj"]},
    "TrainableTokensConfig": {"token_indices": [1, 2]},
}


@pytest.mark.trace
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_peft_writes_is_understood_whole(name: str, tmp_path: Path) -> None:
    import peft

    made = getattr(peft, name)(base_model_name_or_path="llama-7b", **CONFIGS[name])
    made.save_pretrained(tmp_path)
    job = JobOptions(adapter_config=tmp_path, micro_batch="1", seq_len="64").job()
    assert job.remarks == ()
    assert job.model == "llama-7b"
    answer = estimate(job)
    assert 0 < answer.parameters.trainable < answer.parameters.total


def write(folder: Path, **knobs: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(knobs))
    return path


def test_the_knobs_arrive(tmp_path: Path) -> None:
    path = write(tmp_path, peft_type="LORA", base_model_name_or_path="llama-7b", r=64, lora_alpha=16, lora_dropout=0.1)
    job = JobOptions(adapter_config=path).job()
    assert (job.method, job.rank, job.settings) == ("lora", 64, {"method.lora_dropout": 0.1})
    assert JobOptions(adapter_config=path, rank="8", model="mistral-7b").job().rank == 8


def test_another_method_leaves_the_adapters_shape_behind(tmp_path: Path) -> None:
    path = write(tmp_path, peft_type="LORA", base_model_name_or_path="llama-7b", r=64, lora_dropout=0.1)
    job = JobOptions(adapter_config=path, method="full").job()
    assert (job.rank, job.settings) == (None, {})


def test_an_unknown_knob_that_is_on_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, peft_type="LORA", base_model_name_or_path="llama-7b", new_knob=3, off_knob=False)
    (remark,) = JobOptions(adapter_config=path).job().remarks
    assert (remark.what, remark.value) == ("method.new_knob", 3)


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({}, BadFile, "no peft_type"),
        ({"peft_type": "SHADOW"}, Unsupported, "SHADOW is not modelled: a second hidden state"),
        ({"peft_type": "NO_SUCH"}, Unsupported, "NO_SUCH is not modelled yet; modelled: .*lora"),
        ({"peft_type": ["LORA"]}, BadFile, "no peft_type"),
    ],
)
def test_what_is_no_adapter_is_refused(
    tmp_path: Path, knobs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        adapter_config.read(write(tmp_path, **knobs))
