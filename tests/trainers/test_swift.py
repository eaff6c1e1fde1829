"""ms-swift: what its keys mean, there and back, what it cannot say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftplan import trainers
from peftplan.errors import RequestError, Unsupported
from peftplan.job import Job, make_job
from peftplan.trainers import Run
from peftplan.trainers.base import decided
from peftplan.trainers.rules import Inexpressible
from tests.trainers import trips

SWIFT = trainers.get("ms-swift")


def read(**keys: Any) -> Job:
    return SWIFT.read({"model": "qwen25-0.5b", **keys}, name="sft.yaml")


def why(job: Job, key: str) -> str:
    return next((remark.why for remark in job.remarks if remark.what == key), "")


def test_it_goes_by_two_names() -> None:
    assert SWIFT.name == trainers.get("swift").name == "swift"


def test_what_it_does_where_nothing_is_said() -> None:
    job = read()
    assert (job.method, job.rank, job.target_modules) == ("lora", 8, "all-linear")
    assert job.settings["method.lora_dropout"] == 0.05
    assert (job.micro_batch, job.grad_accum, job.batching, job.seq_len) == (1, 16, "exact", None)
    assert (job.recompute, job.settings["recompute.use_reentrant"]) == ("full", True)
    assert (job.dtype, job.precision) == ("bfloat16", "bf16-mixed")
    assert why(job, "use_logits_to_keep").endswith("errs high")
    assert not why(read(use_logits_to_keep=False), "use_logits_to_keep")
    assert read(per_device_train_batch_size=3).grad_accum == 6


@pytest.mark.parametrize(
    ("keys", "dtype", "precision"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16", "bf16-mixed"),
        ({"torch_dtype": "float16"}, "float16", "fp16-mixed"),
        ({"torch_dtype": "float32"}, "float32", "fp16-mixed"),
        ({"torch_dtype": "float32", "fp16": False}, "float32", "fp32"),
        ({"torch_dtype": "bfloat16", "bf16": False}, "bfloat16", "bf16"),
        ({"torch_dtype": "float32", "bf16": True, "fp16": False}, "float32", "bf16-mixed"),
    ],
)
def test_precision(keys: dict[str, Any], dtype: str, precision: str) -> None:
    job = read(**keys)
    assert (job.dtype, job.precision) == (dtype, precision)


def test_a_packed_base() -> None:
    job = read(quant_method="bnb", quant_bits=4)
    assert (job.format, job.settings["format.double_quant"]) == ("nf4", True)
    assert job.settings["format.prepare"] is False
    half = read(quant_method="bnb", quant_bits=4, torch_dtype="float16")
    assert half.settings["format.compute_dtype"] == "float32"
    assert read(quant_method="bnb", quant_bits=8).format == "int8"
    with pytest.raises(RequestError, match="4 or 8 bits"):
        read(quant_method="bnb", quant_bits=3)


def test_methods_by_their_names() -> None:
    assert read(train_type="full").method == "full"
    assert read(tuner_type="full", freeze_parameters_ratio=1, trainable_parameters_regex=".*bias").method == "bitfit"
    named = read(tuner_type="full", freeze_parameters_ratio=1, trainable_parameters_regex=r"(q_proj|v_proj)\.bias$")
    assert named.settings["method.train"] == ("q_proj", "v_proj")
    partly = read(tuner_type="full", freeze_parameters_ratio=0.5)
    assert partly.method == "full"
    assert "errs high" in why(partly, "freeze_parameters_ratio")
    ia3 = read(tuner_type="ia3")
    assert (ia3.method, ia3.target_modules) == ("ia3", "all-linear")
    assert read(tuner_type="vera", target_modules=["v_proj"]).rank == 256
    assert read(tuner_type="fourierft").settings["method.n_frequency"] == 2000
    assert read(tuner_type="boft").settings["method.boft_block_size"] == 4
    assert read(lorap_lr_ratio=16.0).method == "lora_plus"
    assert read(init_weights="pissa").settings["method.init_lora_weights"] == "pissa"
    assert "method.init_lora_weights" not in read(init_weights="true").settings
    lisa = read(tuner_type="full", lisa_activated_layers=4, lisa_step_interval=10)
    assert (lisa.method, lisa.settings["method.activated_layers"]) == ("lisa", 4)
    assert read(tuner_type="full", lisa_activated_layers=0).method == "full"
    pro = read(tuner_type="llamapro", llamapro_num_groups=2)
    assert (pro.method, pro.settings["method.num_new_blocks"], pro.settings["method.num_groups"]) == ("llama_pro", 4, 2)
    with pytest.raises(RequestError, match="longlora does not run"):
        read(tuner_type="longlora")


def test_a_method_that_is_not_modelled_is_said_so_when_it_is_priced() -> None:
    job = read(tuner_type="reft")
    assert job.method == "reft"
    with pytest.raises((RequestError, Unsupported), match="reft"):
        decided(job)


def test_words_of_its_own() -> None:
    assert read(packing=True, attn_impl="flash_attn").batching == "packed"
    assert read(padding_free=True, attn_impl="flash_attn").batching == "packed"
    assert read(per_device_train_batch_size=2).batching == "padded"
    assert read(target_regex=r".*\.q_proj").target_modules == r".*\.q_proj"
    assert read(gradient_checkpointing=False).recompute == "none"
    plain = read(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert "recompute.use_reentrant" not in plain.settings
    assert read(deepspeed="zero2_offload").layout == "zero2"
    assert read(fsdp="fsdp2").layout == "fsdp"
    assert why(read(lora_rnk=4), "lora_rnk") == "not a key of ms-swift==4.6.0; did you mean lora_rank?"


JOBS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["qwen25-0.5b", "tinyllama"]),
        "method": st.sampled_from(
            [
                "full",
                "lora",
                "qlora",
                "dora",
                "rslora",
                "lora_plus",
                "pissa",
                "olora",
                "qdora",
                "ia3",
                "fourierft",
                "boft",
                "lisa",
                "llama_pro",
            ]
        ),
        "micro_batch": st.integers(1, 3),
        "grad_accum": st.integers(1, 4),
        "seq_len": st.sampled_from([64, 1024]),
        "attention": st.sampled_from([None, "eager", "sdpa", "fa2"]),
        "batching": st.sampled_from([None, "packed"]),
        "recompute": st.sampled_from(["none", "full"]),
        "optimizer": st.sampled_from([None, "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit"]),
        "precision": st.sampled_from([None, "bf16-mixed"]),
        "layout": st.sampled_from([None, "zero3", "fsdp"]),
    }
)


@settings(max_examples=60, deadline=None)
@given(JOBS)
def test_there_and_back(fields: dict[str, Any]) -> None:
    if fields["method"] == "boft":
        fields["target_modules"] = "all-linear"
    if fields["method"] == "fourierft":
        fields["set"] = {"method.n_frequency": 500}
        fields["target_modules"] = "all-linear"
    job = make_job(**fields)
    if trips.expressible("swift", job):
        trips.there_and_back("swift", job)
        assert not trips.unknown_keys("swift", SWIFT.config(job, Run()))
    else:
        assert fields["batching"] == "packed"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"method": "freeze"}, "method"),
        ({"method": "ia3", "target_modules": ("k_proj", "v_proj")}, "method"),
        ({"method": "vera"}, "target_modules"),
        ({"batching": "packed", "attention": "sdpa"}, "batching"),
        ({"batching": "padded", "micro_batch": 1}, "batching"),
        ({"method": "eva"}, "method.init_lora_weights"),
        ({"format": "int8", "layout": "fsdp"}, "format"),
        ({"offload": "params+optimizer", "layout": "fsdp"}, "offload"),
        ({"layout": "tp=2"}, "layout"),
    ],
)
def test_what_it_cannot_say(fields: dict[str, Any], field: str) -> None:
    job = make_job(**{"model": "qwen25-0.5b", "method": "lora", **fields})
    with pytest.raises(Inexpressible) as caught:
        SWIFT.config(job, Run())
    assert caught.value.field == field


def test_the_folder() -> None:
    job = make_job(model="llama3-8b", method="lora")
    one = SWIFT.folder(job, Run())
    assert set(one.files) == {"swift.yaml"}
    assert one.command == "swift sft swift.yaml"
    zero = SWIFT.folder(job.model_copy(update={"gpus": 2, "layout": "zero2"}), Run())
    assert zero.command == "swift sft swift.yaml"
    assert set(zero.files) == {"swift.yaml", "zero2.json"}
