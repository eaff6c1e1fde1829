"""Packed formats without their libraries: sizes of published checkpoints, and what is refused and why."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import formats
from peftplan.errors import RequestError
from peftplan.pipeline import estimate
from tests.oracles.equal import PLAIN, tiny_job

LLAMA3_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "torch_dtype": "float16",
}  # fmt: skip
PUBLISHED = {
    # huggingface.co/mobiuslabsgmbh/Llama-3-8b-instruct_2bitgs64_hqq, commit c5acaa2 of 2024-07-16: qmodel.pt
    "hqq": ({"format.nbits": 2, "format.group_size": 64}, 4_283_158_405),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_checkpoint_has_the_bytes_predicted(name: str) -> None:
    knobs, published = PUBLISHED[name]
    fields: dict[str, Any] = {"format": name, "precision": "fp16", "method": "lora", "rank": 1, "set": knobs}
    found = estimate(model="llama-3-8b", config=LLAMA3_8B, target_modules=("q_proj",), seq_len=8, **fields).parameters
    adapters = 4 * found.trainable
    assert found.stored_bytes - adapters == pytest.approx(published, rel=1e-3)


GROUPS = {"format.group_size": 16}
HALF = {"precision": "fp16", "dtype": "fp16"}
DYNAMIC = {"format.activations": "dynamic"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "int4 of torchao": ({"format": "int4wo"}, "trains nothing on torchao's int4"),
    "FBGEMM's float8": ({"format": "fbgemm_fp8"}, "trains nothing on FBGEMM's float8"),
    "all layers of hqq": ({"format": "hqq", "target_modules": "all-linear", "set": GROUPS}, "name them"),
    "odd groups of hqq": ({"format": "hqq", "set": {"format.group_size": 12}}, "multiple of 8"),
    "groups that do not fit": ({"format": "hqq", "set": {"format.group_size": 512}}, "does not divide a weight"),
    "rows for no bytes": ({"format": "hqq", "set": {"format.group_size": 256}}, "use another format.group_size"),
    "five bits": ({"format": "hqq", "set": {"format.nbits": 5}}, "use one of them"),
    "DoRA on EETQ": ({"format": "eetq", **HALF, "set": {"method.use_dora": True}}, "DoRA"),
    "EETQ in fp32": ({"format": "eetq", "precision": "fp32", "dtype": "fp32"}, "read float16"),
    "EETQ on a CPU": ({"format": "eetq", "backend": "cpu"}, "on a GPU only"),
    "float8 on an old GPU": ({"format": "fp8", "gpu": "a100-80gb"}, "use --format bf16"),
    "a product in float8 there": (
        {"format": "float8wo", "target_modules": "all-linear", "gpu": "a100-80gb", "set": DYNAMIC},
        "8.9 and above",
    ),
    "no gradient through int8": ({"format": "int8wo", "set": DYNAMIC}, "hand no gradient on"),
    "prepared quanto": ({"format": "quanto", "set": {"format.prepare": True}}, "leave it out"),
    "blocks that do not fit": ({"format": "torchao_nf4"}, "set format.scaler_block_size"),
    "a bias of its own": ({"format": "int8wo", "set": {"method.lora_bias": True}}, "lora_bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_library_refuses_is_refused_with_its_reason(case: str) -> None:
    fields, reason = REFUSED[case]
    asked = {**PLAIN, "method": "lora", "target_modules": ("q_proj",), "dtype": "bf16", "backend": "cuda", **fields}
    with pytest.raises(RequestError, match=reason):
        estimate(tiny_job("llama", asked))


@pytest.mark.parametrize("alias", ["int8wo", "float8wo", "int4wo", "finegrained_fp8", "int8_weight_only"])
def test_names_in_use_are_known(alias: str) -> None:
    assert formats.canonical(alias) in formats.names()


def test_weights_alone_in_eight_bits_are_kept_unpacked_for_backward() -> None:
    """torchao's F.linear is plain operators: autograd keeps each weight as cast, which checkpointing drops."""
    fields = {**PLAIN, "method": "lora", "target_modules": "all-linear", "dtype": "bf16"}
    kept = {
        name: estimate(tiny_job("llama", {**fields, "format": name})).memory.saved_for_backward_bytes
        for name in ("bf16", "torchao_int8")
    }
    layers = 3 * (48 * (48 + 16 + 16 + 48) + 3 * 48 * 88)
    assert kept["torchao_int8"] - kept["bf16"] >= 2 * layers * 0.9
