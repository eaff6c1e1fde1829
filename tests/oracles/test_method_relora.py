"""ReLoRA against a traced LoRA model that merges between steps as Axolotl's callback does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from peftplan.errors import RequestError
from peftplan.instruments.casting import cast_adapter
from peftplan.job import make_job
from peftplan.pipeline import estimate, read
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, name
from tests.oracles.reference import assert_as_reference

pytestmark = pytest.mark.trace
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL: dict[str, Any] = {"micro_batch": 1, "seq_len": 2, "set": {"loop.outputs_until": "loss"}}
ROWS: list[Row] = [
    ("llama", {**PLAIN, **SMALL}),
    ("llama", {**AGAIN, **SMALL, "grad_accum": 2}),
    ("qwen2", {**MIXED, **SMALL, "dtype": "fp32"}),
    ("gemma", {**WIDE, **SMALL, "target_modules": ("v_proj",)}),
    ("llama", {**PLAIN}),
]


def adapted(model: torch.nn.Module, targets: list[str]) -> torch.nn.Module:
    model = inject_adapter_in_model(LoraConfig(r=8, target_modules=targets), model.requires_grad_(False))
    cast_adapter(model, None)
    return model


def merged(model: torch.nn.Module) -> torch.nn.Module:
    """merge_and_save of a base that is not packed."""
    with torch.no_grad():
        for _, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                update = layer.get_delta_weight("default").detach()
                layer.weight.data += update
    return model


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_it_is_what_the_callback_does(family: str, fields: dict[str, Any]) -> None:
    targets = list(fields.get("target_modules", LINEARS))
    asked = {"target_modules": tuple(targets), "method": "relora", **fields}
    assert_as_reference(family, asked, partial(adapted, targets=targets), between=merged)


def test_the_merge_is_the_peak_where_steps_are_small() -> None:
    job = make_job(
        model="llama-7b", method="relora", target_modules="all-linear", dtype="bf16", micro_batch=1, seq_len=16,
        recompute="full", backend="cpu",
    )  # fmt: skip
    reading = read(job)
    memory = reading.estimate.memory
    assert memory.at_peak_phase == "between"
    assert memory.phases["between"] - memory.static_bytes == 3 * 4 * 4_096 * 11_008
    plain = estimate(job.model_copy(update={"method": "lora"})).memory
    assert {**plain.phases, "between": memory.peak_bytes} == memory.phases


def test_a_packed_base_is_packed_anew() -> None:
    fields: dict[str, Any] = {
        "model": "llama-7b", "method": "relora", "target_modules": "all-linear", "format": "nf4", "micro_batch": 1,
        "seq_len": 16, "backend": "cpu",
    }  # fmt: skip
    elements = 4_096 * 11_008
    here, there = (
        estimate(make_job(**fields, set={"method.cpu_offload": offload})).memory for offload in (False, True)
    )
    assert here.phases["between"] - here.static_bytes == 14 * elements
    assert there.phases["between"] - there.static_bytes == 4 * elements


def test_the_paper_trains_70_of_250_million() -> None:
    """Its table of hyper-parameters: of 247M, rank 128 trains 99M beside the embedding and the norms (section 4, table
    2: 250M, full 247M, LoRA 99M); the shapes are those of its configs/llama_250m.json."""
    config = {
        "model_type": "llama", "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 24,
        "num_attention_heads": 16, "vocab_size": 32100, "max_position_embeddings": 1024,
    }  # fmt: skip
    job = make_job(model="llama_250m", config=config, method="relora", rank=128, target_modules="all-linear", seq_len=8)
    found = estimate(job).parameters
    adapters = 24 * 128 * (4 * 2 * 768 + 3 * (768 + 2560))
    assert found.trainable == adapters
    embedding_head_and_norms = 2 * 32_100 * 768 + 49 * 768
    assert round((adapters + embedding_head_and_norms) / 1e6) == 99


def test_it_says_what_is_wrong() -> None:
    with pytest.raises(RequestError, match="merges adapters only"):
        estimate(make_job(model="llama-7b", method="relora", set={"method.modules_to_save": ("lm_head",)}))
