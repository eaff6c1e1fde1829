"""Axolotl: what its keys mean, there and back, what it cannot say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftplan import trainers
from peftplan.errors import RequestError
from peftplan.job import Job, make_job
from peftplan.trainers import Run
from peftplan.trainers.rules import Inexpressible
from tests.trainers import trips

AXOLOTL = trainers.get("axolotl")
SMALL = {"base_model": "qwen25-0.5b", "datasets": [{"path": "x", "type": "alpaca"}]}


_MOVED = {"offload_optimizer": {"device": "cpu"}}


def read(**keys: Any) -> Job:
    return AXOLOTL.read({**SMALL, **keys}, name="axolotl.yaml")


def why(job: Job, key: str) -> str:
    return next((remark.why for remark in job.remarks if remark.what == key), "")


def test_what_it_does_where_nothing_is_said() -> None:
    job = read()
    said = (job.method, job.micro_batch, job.seq_len, job.grad_accum, job.recompute, job.optimizer, job.attention)
    assert said == ("full", 1, 512, 1, "none", "adamw", "sdpa")
    assert (job.dtype, job.precision, job.batching) == ("bfloat16", "bf16-mixed", "padded")
    assert job.settings["optimizer.impl"] == "fused"
    assert job.settings["loop.outputs_until"] == "loss"


@pytest.mark.parametrize(
    ("keys", "dtype", "precision"),
    [
        ({"bf16": "auto"}, "bfloat16", "bf16-mixed"),
        ({"bf16": True, "fp16": False}, "bfloat16", "bf16-mixed"),
        ({"bfloat16": True, "bf16": False}, "bfloat16", "bf16-mixed"),
        ({"bf16": "full"}, "bfloat16", "bf16"),
        ({"bf16": False, "fp16": True}, "float16", "fp16-mixed"),
        ({"bf16": "auto", "fp16": True}, "float16", "fp16-mixed"),
        ({"bf16": False, "float16": True}, "float16", "fp16"),
        ({"bf16": False, "fp16": None}, "float32", "fp32"),
        ({"bf16": False, "adapter": "lora", "load_in_8bit": True}, "float16", "fp16"),
    ],
)
def test_precision(keys: dict[str, Any], dtype: str, precision: str) -> None:
    job = read(**keys)
    assert (job.dtype, job.precision) == (dtype, precision)


@pytest.mark.parametrize(
    ("keys", "attention"),
    [
        ({"flash_attention": True}, "flash_attention_2"),
        ({"sdp_attention": True}, "sdpa"),
        ({"eager_attention": True}, "eager"),
        ({"flash_attention": True, "xformers_attention": False}, "flash_attention_2"),
        ({"attn_implementation": "flash_attention_3"}, "flash_attention_3"),
    ],
)
def test_attention_by_its_old_and_new_names(keys: dict[str, Any], attention: str) -> None:
    job = read(**keys)
    assert job.attention == attention
    assert "attention" not in job.extras


def test_attention_that_is_not_modelled_is_named() -> None:
    job = read(xformers_attention=True)
    assert job.attention == "flash_attention_2"
    assert "xformers is not modelled" in why(job, "xformers_attention")
    assert job.extras["xformers_attention"] is True


def test_packing_depends_on_the_attention() -> None:
    assert read(sample_packing=True, flash_attention=True).batching == "packed"
    masked = read(sample_packing=True, sdp_attention=True)
    assert masked.batching == "padded"
    assert "one row a pack" in why(masked, "sample_packing")
    assert read(batch_flattening=True, flash_attention=True, micro_batch_size=2).batching == "packed"
    assert read(pad_to_sequence_len=False).batching == "exact"
    assert read(pad_to_sequence_len=False, micro_batch_size=2).batching == "padded"


def test_a_packed_base() -> None:
    job = read(adapter="qlora", load_in_4bit=True, lora_r=8, lora_target_linear=True)
    assert (job.method, job.format, job.target_modules, job.rank) == ("lora", "nf4", "all-linear", 8)
    assert job.settings["format.double_quant"] is True
    assert job.settings["format.prepare"] is False
    single = read(adapter="qlora", load_in_4bit=True, bnb_config_kwargs={"bnb_4bit_use_double_quant": False})
    assert "format.double_quant" not in single.settings
    with pytest.raises(RequestError, match="needs load_in_4bit"):
        read(adapter="qlora")
    ignored = read(adapter="lora", load_in_4bit=True)
    assert ignored.format is None
    assert "does not read it" in why(ignored, "load_in_4bit")


def test_targets_named_twice() -> None:
    job = read(adapter="lora", lora_r=8, lora_target_linear=True, lora_target_modules=["q_proj", "lm_head"])
    assert job.target_modules == "all-linear"
    assert "without lm_head" in why(job, "lora_target_modules")


def test_names_with_dots_stay_whole() -> None:
    pattern = {"layers.0.self_attn.q_proj": 4, "v_proj": 2}
    job = read(adapter="lora", lora_r=8, lora_target_linear=True, lora_rank_pattern=pattern)
    assert job.settings["method.rank_pattern"] == pattern
    assert AXOLOTL.config(job, Run())["lora_rank_pattern"] == pattern


def test_accumulation_from_the_batch_size() -> None:
    assert read(batch_size=32, micro_batch_size=4).grad_accum == 8
    assert read(batch_size=32, micro_batch_size=4, gradient_accumulation_steps=2).grad_accum == 2


def test_unfrozen_parameters() -> None:
    assert read(unfrozen_parameters=[".+bias$"]).method == "bitfit"
    assert read(unfrozen_parameters=[".+q_proj.bias$"]).settings["method.train"] == ("q_proj",)
    job = read(unfrozen_parameters=["^lm_head.weight$", "model.layers.2[0-9]+.mlp"])
    assert job.method == "full"
    assert "errs high" in why(job, "unfrozen_parameters")
    assert AXOLOTL.config(job, Run())["unfrozen_parameters"] == ["^lm_head.weight$", "model.layers.2[0-9]+.mlp"]


def test_lisa_needs_both_of_its_keys() -> None:
    job = read(lisa_n_layers=4, lisa_step_interval=20, lisa_layers_attribute="model.layers")
    assert (job.method, job.settings["method.activated_layers"], job.settings["method.states"]) == ("lisa", 4, "all")
    assert not why(job, "lisa_n_layers")
    assert AXOLOTL.config(job, Run())["lisa_layers_attribute"] == "model.layers"
    assert read(lisa_n_layers=4).method == "full"
    active = job.model_copy(update={"settings": {**job.settings, "method.states": "active"}})
    with pytest.raises(Inexpressible, match=r"method\.states=active"):
        AXOLOTL.config(active, Run())


def test_restarts() -> None:
    job = read(
        adapter="qlora", load_in_4bit=True, lora_r=8, relora=True, relora_cpu_offload=True, jagged_restart_steps=9
    )
    assert (job.method, job.rank, job.settings["method.cpu_offload"]) == ("relora", 8, True)
    assert not why(job, "relora")
    assert AXOLOTL.config(job, Run())["jagged_restart_steps"] == 9


def test_fused_kernels_are_on_where_no_key_says_otherwise() -> None:
    lora = {"adapter": "lora", "lora_r": 8, "lora_target_linear": True}
    assert "on where no lora_*_kernel key is set" in why(read(**lora), "lora_mlp_kernel")
    assert not why(read(**lora, lora_mlp_kernel=False), "lora_mlp_kernel")
    assert not why(read(**lora, load_in_8bit=True), "lora_mlp_kernel")
    assert not why(read(**lora, trust_remote_code=True), "lora_mlp_kernel")
    on = read(**lora, lora_qkv_kernel=True)
    assert "errs high" in why(on, "lora_qkv_kernel")
    written = AXOLOTL.config(on, Run())
    assert written["lora_qkv_kernel"] is True
    assert not written.get("lora_mlp_kernel")


@pytest.mark.parametrize(
    ("keys", "layout", "offload"),
    [
        ({"deepspeed": "deepspeed_configs/zero3_bf16.json"}, "zero3", None),
        ({"deepspeed": {"zero_optimization": {"stage": 2, **_MOVED}}}, "zero2", "optimizer"),
        ({"fsdp": ["full_shard", "auto_wrap", "offload"], "fsdp_config": {}}, "fsdp", "params+optimizer"),
        ({"fsdp_config": {"fsdp_offload_params": True}}, "fsdp", "params+optimizer"),
        ({"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}, "fsdp", None),
        ({"fsdp_config": {"a": 1}, "tensor_parallel_size": 2, "dp_shard_size": 2}, "fsdp,tp=2", None),
        ({"deepspeed": None, "fsdp": None}, None, None),
    ],
)  # fmt: skip
def test_layouts(keys: dict[str, Any], layout: str | None, offload: str | None) -> None:
    job = read(**keys)
    assert (job.layout, job.offload) == (layout, offload)


def test_what_stands_in_is_written_back_until_the_job_says_otherwise() -> None:
    job = read(fsdp_config={"fsdp_use_orig_params": True, "fsdp_offload_params": False}, xformers_attention=True)
    kept = AXOLOTL.config(job, Run())
    assert kept["fsdp_config"] == {"fsdp_use_orig_params": True, "fsdp_offload_params": False}
    assert kept["xformers_attention"] is True
    assert "attn_implementation" not in kept
    changed = AXOLOTL.config(job.model_copy(update={"offload": "params+optimizer", "attention": "sdpa"}), Run())
    assert changed["fsdp_config"]["offload_params"] is True
    assert changed["attn_implementation"] == "sdpa"
    assert "xformers_attention" not in changed


def test_the_mesh_says_how_many_gpus() -> None:
    assert read(fsdp_config={"a": 1}, tensor_parallel_size=2, dp_shard_size=4).gpus == 8
    assert read(gradient_checkpointing=False, fsdp_config={"activation_checkpointing": True}).recompute == "full"


def test_a_misspelt_key_is_named_with_its_neighbour() -> None:
    job = read(adapter="lora", lora_rr=8)
    assert why(job, "lora_rr") == "not a key of axolotl==0.19.0; did you mean lora_r?"


JOBS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["qwen25-0.5b", "tinyllama"]),
        "method": st.sampled_from(
            ["full", "lora", "qlora", "dora", "rslora", "lora_plus", "pissa", "qdora", "bitfit", "lisa", "relora"]
        ),
        "micro_batch": st.integers(1, 3),
        "grad_accum": st.integers(1, 4),
        "seq_len": st.sampled_from([64, 1024]),
        "attention": st.sampled_from([None, "eager", "sdpa", "fa2", "flash_attention_3"]),
        "batching": st.sampled_from([None, "padded", "packed"]),
        "recompute": st.sampled_from(["none", "full"]),
        "optimizer": st.sampled_from([None, "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit"]),
        "precision": st.sampled_from([None, "bf16-mixed", "fp32"]),
        "layout": st.sampled_from([None, "fsdp", "zero3", "zero2"]),
    }
)


@settings(max_examples=60, deadline=None)
@given(JOBS)
def test_there_and_back(fields: dict[str, Any]) -> None:
    if fields["method"] == "bitfit":
        fields["model"] = "qwen25-0.5b"
    if fields["method"] == "lisa":
        fields["set"] = {"method.states": "all"}
    job = make_job(**fields)
    if trips.expressible("axolotl", job):
        trips.there_and_back("axolotl", job)
        assert not trips.unknown_keys("axolotl", AXOLOTL.config(job, Run()))
    else:
        reasons = (fields["batching"] == "packed", fields["precision"] == "fp32", "pissa" in fields["method"])
        assert any(reasons)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"precision": "bf16", "dtype": "bfloat16"}, "precision"),
        ({"batching": "packed", "attention": "sdpa"}, "batching"),
        ({"batching": "exact", "micro_batch": 2}, "batching"),
        ({"method": "ia3"}, "method"),
        ({"method": "loftq"}, "method.init_lora_weights"),
        ({"method": "pissa", "format": "nf4"}, "method.init_lora_weights"),
        ({"format": "int8", "layout": "fsdp"}, "format"),
        ({"layout": "tp=2"}, "layout"),
        ({"optimizer": "adamw_for_loop"}, "optimizer"),
        ({"format": "nf4", "set": {"format.blocksize": 128}}, "format.blocksize"),
    ],
)
def test_what_it_cannot_say(fields: dict[str, Any], field: str) -> None:
    job = make_job(**{"model": "qwen25-0.5b", "method": "lora", **fields})
    with pytest.raises(Inexpressible) as caught:
        AXOLOTL.config(job, Run())
    assert caught.value.field == field


def test_the_folder() -> None:
    job = make_job(model="llama3-8b", method="qlora")
    one = AXOLOTL.folder(job, Run())
    assert set(one.files) == {"axolotl.yaml"}
    assert one.command == "axolotl train axolotl.yaml --launcher python"
    several = AXOLOTL.folder(job.model_copy(update={"gpus": 4, "layout": "zero3"}), Run())
    assert set(several.files) == {"axolotl.yaml", "zero3.json"}
    assert "--launcher torchrun -- --nnodes $NNODES" in several.command
    assert "base_model: meta-llama/Meta-Llama-3-8B" in one.files["axolotl.yaml"]
