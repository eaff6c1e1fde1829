"""LLaMA-Factory: what its keys mean, there and back, what it cannot say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftplan import trainers
from peftplan.errors import RequestError
from peftplan.job import Job, make_job
from peftplan.pipeline import estimate
from peftplan.trainers import Run
from peftplan.trainers.base import decided
from peftplan.trainers.rules import Inexpressible
from tests.trainers import trips

FACTORY = trainers.get("llamafactory")


def read(**keys: Any) -> Job:
    return FACTORY.read({"model_name_or_path": "qwen25-0.5b", **keys}, name="train.yaml")


def why(job: Job, key: str) -> str:
    return next((remark.why for remark in job.remarks if remark.what == key), "")


def test_what_it_does_where_nothing_is_said() -> None:
    job = read()
    assert (job.method, job.rank, job.target_modules) == ("lora", 8, "all-linear")
    assert (job.micro_batch, job.seq_len, job.grad_accum, job.batching) == (8, 2048, 1, "padded")
    assert (job.recompute, job.settings["recompute.use_reentrant"]) == ("full", True)
    assert (job.optimizer, job.settings["optimizer.impl"]) == ("adamw", "fused")
    assert decided(job).precision == "bf16"
    assert job.settings["model.use_cache"] is False


def test_full_fine_tuning_trains_fp32_weights_unless_told() -> None:
    mixed = read(finetuning_type="full", bf16=True)
    assert (decided(mixed).dtype, mixed.precision) == ("float32", "bf16-mixed")
    pure = decided(read(finetuning_type="full", pure_bf16=True))
    assert (pure.dtype, pure.precision) == ("bfloat16", "bf16")
    plain = decided(read(finetuning_type="full"))
    assert (plain.dtype, plain.precision) == ("float32", "fp32")
    assert estimate(pure).memory.static_bytes < estimate(mixed).memory.static_bytes


def test_a_packed_base() -> None:
    job = read(quantization_bit=4)
    assert (job.format, job.settings["format.double_quant"]) == ("nf4", True)
    assert job.settings["format.prepare"] is False
    assert "format.double_quant" not in read(quantization_bit=4, double_quantization=False).settings
    assert read(quantization_bit=8).format == "int8"
    assert read(quantization_bit=4, quantization_type="fp4").format == "fp4"
    assert read(quantization_bit=4, quantization_method="hqq").format == "hqq"
    with pytest.raises(RequestError, match="4 or 8 bits"):
        read(quantization_bit=3)


def test_the_last_layers_train() -> None:
    job = read(finetuning_type="freeze", freeze_trainable_layers=3, freeze_extra_modules="norm,lm_head", bf16=True)
    assert (job.method, job.settings["method.layers"]) == ("freeze", 3)
    assert job.settings["method.train"] == ("model.norm", "lm_head")
    assert "errs high" in why(job, "finetuning_type")
    first = read(finetuning_type="freeze", freeze_trainable_layers=-2)
    assert first.settings["method.layers"] == 2
    assert "errs low" in why(first, "freeze_trainable_layers")
    assert FACTORY.config(first, Run())["freeze_trainable_layers"] == -2


def test_an_expanded_model() -> None:
    keys = {"finetuning_type": "freeze", "freeze_trainable_layers": 8, "use_llama_pro": True}
    job = read(**keys, freeze_extra_modules="norm", pure_bf16=True)
    assert (job.method, job.settings["method.num_new_blocks"], job.settings["method.expand"]) == ("llama_pro", 8, False)
    assert job.settings["method.train"] == ("model.norm",)
    assert "errs low" in why(job, "use_llama_pro")
    assert not why(read(**keys, disable_gradient_checkpointing=True), "use_llama_pro")
    assert "errs high" in why(read(use_llama_pro=True), "use_llama_pro")


def test_a_block_at_a_time() -> None:
    job = read(finetuning_type="full", use_badam=True, badam_switch_mode="fixed", badam_start_block=0, bf16=True)
    assert (job.method, job.settings["method.switch_mode"], job.settings["method.start_block"]) == ("badam", "fixed", 0)
    assert (job.precision, job.dtype) == ("bf16-mixed", None)
    assert "errs low" in why(job, "use_badam")
    assert FACTORY.config(job, Run())["badam_start_block"] == 0
    ratio = read(finetuning_type="full", use_badam=True, badam_mode="ratio")
    assert ratio.method == "full"
    assert "sparse gradients" in why(ratio, "use_badam")
    assert FACTORY.config(ratio, Run())["badam_mode"] == "ratio"


@pytest.mark.parametrize(
    ("keys", "batching"),
    [
        ({}, "padded"),
        ({"packing": True}, "exact"),
        ({"stage": "pt"}, "exact"),
        ({"neat_packing": True, "flash_attn": "fa2"}, "packed"),
        ({"neat_packing": True}, "padded"),
    ],
)
def test_packing(keys: dict[str, Any], batching: str) -> None:
    assert read(**keys).batching == batching


def test_words_of_its_own() -> None:
    assert read(flash_attn="disabled").attention == "eager"
    assert read(flash_attn="fa2").attention == "flash_attention_2"
    assert read(disable_gradient_checkpointing=True).recompute == "none"
    assert "recompute.use_reentrant" not in read(use_reentrant_gc=False).settings
    assert read(lora_target="q_proj,v_proj").target_modules == ("q_proj", "v_proj")
    assert read(additional_target="embed_tokens,lm_head").settings["method.modules_to_save"] == (
        "embed_tokens", "lm_head",
    )  # fmt: skip
    assert read(pissa_init=True).settings["method.init_lora_weights"] == "pissa_niter_16"
    assert read(loraplus_lr_ratio=16.0).method == "lora_plus"
    assert read(deepspeed="examples/deepspeed/ds_z2_config.json").layout == "zero2"
    assert why(read(stage="dpo"), "stage").endswith("errs low")
    assert not why(read(stage="sft"), "stage")
    assert why(read(lora_rnk=4), "lora_rnk") == "not a key of llamafactory==0.9.5; did you mean lora_rank?"


JOBS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["qwen25-0.5b", "tinyllama"]),
        "method": st.sampled_from(
            [
                "full",
                "freeze",
                "lora",
                "qlora",
                "dora",
                "rslora",
                "lora_plus",
                "pissa",
                "qdora",
                "oft",
                "badam",
                "llama_pro",
            ]
        ),
        "micro_batch": st.integers(1, 3),
        "grad_accum": st.integers(1, 4),
        "seq_len": st.sampled_from([64, 1024]),
        "attention": st.sampled_from([None, "eager", "sdpa", "fa2"]),
        "batching": st.sampled_from([None, "padded", "exact", "packed"]),
        "recompute": st.sampled_from(["none", "full"]),
        "optimizer": st.sampled_from([None, "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit"]),
        "precision": st.sampled_from([None, "bf16-mixed"]),
        "target_modules": st.sampled_from([None, "all-linear", ("q_proj", "v_proj")]),
        "layout": st.sampled_from([None, "zero3", "zero2"]),
    }
)


@settings(max_examples=60, deadline=None)
@given(JOBS)
def test_there_and_back(fields: dict[str, Any]) -> None:
    if fields["method"] == "llama_pro":
        fields["set"] = {"method.num_new_blocks": 1, "method.expand": False}
    if fields["method"] in ("full", "freeze", "badam", "llama_pro"):
        fields["target_modules"] = None
    elif fields["method"] == "oft":
        fields["target_modules"] = "all-linear"
    job = make_job(**fields)
    if trips.expressible("llamafactory", job):
        trips.there_and_back("llamafactory", job)
        assert not trips.unknown_keys("llamafactory", FACTORY.config(job, Run()))
    else:
        assert fields["batching"] == "packed"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"method": "ia3"}, "method"),
        ({"method": "llama_pro", "set": {"method.num_new_blocks": 1}}, "method.expand"),
        ({"method": "badam", "set": {"method.include_embedding": True}}, "method.include_embedding"),
        ({"target_modules": r".*\.q_proj"}, "target_modules"),
        ({"batching": "packed", "attention": "sdpa"}, "batching"),
        ({"batching": "packed", "attention": "fa2", "micro_batch": 2}, "batching"),
        ({"method": "olora"}, "method.init_lora_weights"),
        ({"method": "full", "dtype": "float16"}, "precision"),
        ({"adapter_dtype": "bfloat16"}, "adapter_dtype"),
        ({"format": "int8", "layout": "fsdp"}, "format"),
    ],
)
def test_what_it_cannot_say(fields: dict[str, Any], field: str) -> None:
    job = make_job(**{"model": "qwen25-0.5b", "method": "lora", **fields})
    with pytest.raises(Inexpressible) as caught:
        FACTORY.config(job, Run())
    assert caught.value.field == field


def test_the_folder() -> None:
    job = make_job(model="llama3-8b", method="lora")
    one = FACTORY.folder(job, Run(dataset="chats.jsonl"))
    assert one.command == "llamafactory-cli train llamafactory.yaml"
    assert json.loads(one.files["dataset_info.json"])["data"]["file_name"] == "chats.jsonl"
    dry = FACTORY.folder(job, Run(dataset="smoke/data.jsonl", on_cpu=True))
    assert "dataset_dir: smoke" in dry.files["llamafactory.yaml"]
    assert json.loads(dry.files["dataset_info.json"])["data"]["file_name"] == "data.jsonl"
    zero = FACTORY.folder(job.model_copy(update={"gpus": 2, "layout": "zero3"}), Run())
    assert zero.command == "env FORCE_TORCHRUN=1 llamafactory-cli train llamafactory.yaml"
    assert "zero3.json" in zero.files
    fsdp = FACTORY.folder(job.model_copy(update={"gpus": 2, "layout": "fsdp"}), Run())
    assert fsdp.command.startswith("accelerate launch --config_file accelerate.yaml -m llamafactory.launcher")
    assert "accelerate.yaml" in fsdp.files
