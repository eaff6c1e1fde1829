"""GPTQ as gptqmodel holds and trains it: bytes of its own layers, and every method against the traced model."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("gptqmodel")

from peftplan import formats, methods
from peftplan.errors import PeftplanError, RequestError
from peftplan.formats.gptq import Gptq
from peftplan.graph.core import Tensor
from peftplan.instruments import prequantized
from peftplan.instruments.trace import trace
from peftplan.job import Job
from peftplan.pipeline import estimate
from peftplan.units import DType
from tests.oracles.equal import assert_equal, tiny_job
from tests.oracles.test_packed import SMALL, TRACED

pytestmark = pytest.mark.trace

HALF: dict[str, Any] = {"precision": "fp16", "dtype": "fp16"}
BASE: dict[str, Any] = {"format": "gptq", "batching": "exact", "recompute": "none", **HALF}
LORA = {**BASE, "method": "lora", "target_modules": ("q_proj", "o_proj", "down_proj")}
WHOLE = ("trainable_tokens", "adaption_prompt")
"""Whose target_modules are no linear layers."""
SHAPES = ((48, 88), (96, 33), (16, 7), (3, 5), (64, 64), (301, 257))


@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layers_hold_the_bytes_predicted(bits: int, group: int) -> None:
    import torch

    fmt = formats.make("gptq", {"bits": bits, "group_size": group, "kernel": "torch"})
    assert isinstance(fmt, Gptq)
    knobs = {"bits": bits, "group_size": group}
    for rows, columns in SHAPES if bits != 3 else ((96, 64), (32, 160)):
        layer = prequantized.FORMATS["gptq"](torch.nn.Linear(columns, rows, bias=False, device="meta"), knobs)
        held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in layer.buffers()}
        weight = Tensor("w", (rows, columns), DType.float16)
        assert fmt.stored(weight).nbytes == sum(held.values())
        assert fmt.file_bytes(weight) == sum(t.nbytes for t in layer.state_dict().values())


@pytest.mark.parametrize("family", ["llama", "llama_biased", "qwen2"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"precision": "bf16", "dtype": "bf16", "batching": "padded"},
        {"precision": "fp32", "dtype": "fp32"},
        {"precision": "bf16-mixed", "dtype": "bf16"},
        {"precision": "bf16-mixed", "dtype": "fp32"},
        {"set": {"format.bits": 8, "format.group_size": 32, "method.lora_dropout": 0.1}},
        {"set": {"format.bits": 2, "format.group_size": -1}},
        {"recompute": "full"},
        {"recompute": "full", "set": {"recompute.use_reentrant": True}},
        {"set": {"method.adapters": 2, "method.active_adapters": 2}},
    ],
)
def test_lora_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {**LORA, **fields})


def job_of(method: str) -> Job:
    knobs = {f"method.{key}": value for key, value in (methods.example(method) | SMALL.get(method, {})).items()}
    named = knobs.pop("method.target_modules", None)
    takes = "target_modules" in methods.settings_of(method)[0] and method not in WHOLE
    targets = {"target_modules": named if method == "ln_tuning" else ("q_proj", "v_proj", "down_proj")} if takes else {}
    return tiny_job("llama", {**BASE, "method": method, **targets, "set": knobs})


@pytest.mark.parametrize("method", TRACED)
def test_a_method_is_what_peft_does_or_peft_fails_too(method: str) -> None:
    job = job_of(method)
    try:
        estimate(job)
    except RequestError:
        if method != "full":  # which transformers' Trainer refuses (validate_quantization_for_training)
            with pytest.raises(PeftplanError):
                trace(job, mode="real")
        return
    from peftplan.pipeline import read
    from tests.oracles.equal import assert_same

    assert_same(trace(job), read(job).estimate)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"set": {"format.bits": 5}}, "format.bits=5: use one of 2, 3, 4, 8"),
        ({"set": {"format.group_size": 100}}, "format.group_size=100: use one of"),
        ({"set": {"format.kernel": "marlin"}}, "has no backward"),
        ({"set": {"format.kernel": "triton_v2"}}, "which 32 does not divide"),
        ({"set": {"format.kernel": "triton_v2"}, "dtype": "bf16", "precision": "bf16"}, "fp16"),
        ({"set": {"format.bits": 3}}, "which 32 does not divide"),
        ({"target_modules": "all-linear"}, "name the modules"),
        ({"method": "dora"}, "PEFT has no LoRA with use_dora on the layers of gptq"),
        ({"method": "full", "target_modules": None}, "cannot train packed weights"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        estimate(tiny_job("llama", {**LORA, **fields}))
