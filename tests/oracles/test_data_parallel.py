"""What a rank of FSDP2 holds and runs, against the real `fully_shard` in torch's fake process group."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from peftplan.instruments.trace import trace
from peftplan.job import make_job
from peftplan.pipeline import read

pytestmark = pytest.mark.trace

CONFIG: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 88, "vocab_size": 97, "max_position_embeddings": 64,
    "pad_token_id": 0, "torch_dtype": "bfloat16",
}  # fmt: skip
ALL_LINEAR: dict[str, Any] = {"rank": 4, "target_modules": "all-linear"}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 4},
    "dora": {"method": "lora", "rank": 4, "set": {"method.use_dora": True}},
    "oft": {"method": "oft", "set": {"method.r": 0, "method.oft_block_size": 4}},
    "freeze": {"method": "freeze"},
    "vera": {"method": "vera"},
    "layernorm": {"method": "ln_tuning"},
    "p_tuning": {"method": "prompt_tuning", "set": {"method.num_virtual_tokens": 4}},
    "qlora": {"method": "qlora", "rank": 4, "recompute": "none", "set": {"format.quant_storage": "bf16"}},
}
WORLDS = (2, 3, 8, 64)
POLICY = {"layout.param_dtype": "bf16"}
CASES: dict[str, dict[str, Any]] = {
    **{f"{name} on {world}": {**fields, "gpus": world} for name, fields in METHODS.items() for world in WORLDS},
    "full recomputed": {"recompute": "full"},
    "lora recomputed": {**METHODS["lora"], "recompute": "full"},
    "gathered until backward": {"set": {"layout.reshard_after_forward": False}},
    "torchtitan's policy": {"precision": "fp32", "set": {**POLICY, "layout.reduce_dtype": "fp32"}},
    "accelerate's policy": {"precision": "bf16-mixed"},
    "accelerate's policy, lora": {**METHODS["lora"], "precision": "bf16-mixed", "dtype": "bf16"},
    "copies of shards": {"layout": "hsdp", "nodes": 2, "gpus": 4},
    "copies of shards, reduced in half precision": {
        "layout": "hsdp", "nodes": 2, "gpus": 4, "precision": "fp32", "set": {**POLICY, "layout.reduce_dtype": "bf16"},
    },
    "accumulated whole": {"grad_accum": 2},
    "accumulated in shards": {"grad_accum": 2, "set": {"layout.no_sync": False}},
    "an optimizer without states": {"optimizer": "sgd"},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_rank_is_the_real_one(name: str) -> None:
    fields = {
        "model": "tiny", "config": CONFIG, "method": "full", "micro_batch": 3, "seq_len": 17, "batching": "exact",
        "backend": "cpu", "gpus": 8, "layout": "fsdp", **CASES[name],
    }  # fmt: skip
    job = make_job(**fields)
    said, real = read(job), trace(job)
    memory = said.estimate.memory
    weights = said.static["weight"] + said.static["adapter"]
    assert weights == real.static["parameter"] + real.static["quantization"]
    assert said.static["state"] == real.static["optimizer"] + real.static["optimizer_step"]
    assert memory.static_bytes == real.static_bytes
    assert memory.saved_for_backward_bytes == real.saved_for_backward_bytes
    assert memory.phases["backward"] == pytest.approx(real.phases["backward"], rel=2e-3)
    assert memory.peak_bytes == pytest.approx(real.peak_bytes, rel=2e-3)
    assert said.estimate.flops.forward == real.flops["forward"]
