"""GPTQ and AWQ as gptqmodel holds and trains them: its own layers, and every method against the traced model."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("gptqmodel")

import torch

from peftplan import formats, methods
from peftplan.errors import PeftplanError, RequestError
from peftplan.formats._prequantized import Prequantized
from peftplan.graph.core import Tensor
from peftplan.instruments import prequantized
from peftplan.instruments.trace import trace
from peftplan.job import Job
from peftplan.pipeline import estimate, read
from peftplan.units import DType
from tests.oracles.equal import assert_equal, assert_same, tiny_job
from tests.oracles.test_packed import SMALL, TRACED

pytestmark = pytest.mark.trace

OWN: dict[str, dict[str, Any]] = {
    "gptq": {},
    "awq": {"format.kernel": "torch", "format.group_size": -1},
}
"""What the trace can run of each."""
WHOLE = ("trainable_tokens", "adaption_prompt")
"""Whose target_modules are no linear layers."""
SHAPES = ((48, 88), (96, 33), (16, 7), (3, 5), (64, 64), (301, 257))


def half(fmt: str, **fields: Any) -> dict[str, Any]:
    """A job's fields for a format in fp16; `set` beside what the format needs."""
    job = {"format": fmt, "batching": "exact", "recompute": "none", "precision": "fp16", "dtype": "fp16", **fields}
    return {**job, "set": {**OWN[fmt], **fields.get("set", {})}}


def lora(fmt: str, **fields: Any) -> dict[str, Any]:
    return half(fmt, **{"method": "lora", "target_modules": ("q_proj", "o_proj", "down_proj"), **fields})


def assert_held(name: str, knobs: dict[str, Any], shape: tuple[int, int]) -> None:
    """What the format says of a weight is what the library's layer holds, and what its checkpoint does."""
    fmt: Any = formats.make(name, {**knobs, "kernel": "torch"})
    assert isinstance(fmt, Prequantized)
    rows, columns = shape
    layer = prequantized.FORMATS[name](torch.nn.Linear(columns, rows, bias=False, device="meta"), knobs)
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in layer.buffers()}
    weight = Tensor("w", shape, DType.float16)
    assert fmt.stored(weight).nbytes == sum(held.values())
    assert fmt.file_bytes(weight) == sum(t.nbytes for t in layer.state_dict().values())


@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layers_of_gptq_hold_the_bytes_predicted(bits: int, group: int) -> None:
    for shape in SHAPES if bits != 3 else ((96, 64), (32, 160)):
        assert_held("gptq", {"bits": bits, "group_size": group}, shape)


@pytest.mark.parametrize("group", [-1, 32, 64, 128])
def test_layers_of_awq_hold_the_bytes_predicted(group: int) -> None:
    for shape in ((48, 256), (96, 384), (8, 128)):
        assert_held("awq", {"group_size": group}, shape)


def test_codes_and_zeros_of_gptq_are_what_fsdp_shards() -> None:
    layer = prequantized.FORMATS["gptq"](torch.nn.Linear(96, 64, bias=False, device="meta"), {})
    fmt, weight = formats.make("gptq", {"kernel": "triton_v2"}), Tensor("w", (64, 96), DType.float16)
    assert fmt.storage(DType.float16) is DType.float16
    assert fmt.sharded_bytes(weight) == layer._buffers["qweight"].nbytes + layer._buffers["qzeros"].nbytes
    assert formats.make("gptq", {}).storage(DType.float16) is None


@pytest.mark.parametrize("fmt", OWN)
@pytest.mark.parametrize("family", ["llama", "llama_biased", "qwen2"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"precision": "bf16", "dtype": "bf16", "batching": "padded"},
        {"precision": "fp32", "dtype": "fp32"},
        {"precision": "bf16-mixed", "dtype": "bf16"},
        {"precision": "bf16-mixed", "dtype": "fp32", "set": {"format.prepare": False}},
        {"set": {"method.lora_dropout": 0.1, "format.prepare": False}},
        {"recompute": "full"},
        {"recompute": "full", "set": {"recompute.use_reentrant": True}},
        {"set": {"method.adapters": 2, "method.active_adapters": 2}},
    ],
    ids=["fp16", "bf16", "fp32", "mixed", "mixed-32", "dropout", "recompute", "reentrant", "two"],
)
def test_lora_is_what_peft_does(family: str, fields: dict[str, Any], fmt: str) -> None:
    assert_equal(family, lora(fmt, **fields))


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (2, -1)])
def test_other_widths(bits: int, group: int) -> None:
    assert_equal("llama", lora("gptq", set={"format.bits": bits, "format.group_size": group}))


@pytest.mark.parametrize(
    "fields",
    [{}, {"recompute": "full"}, {"precision": "bf16-mixed", "dtype": "bf16", "batching": "padded"}],
    ids=["fp16", "recompute", "mixed"],
)
def test_pooled_inputs_are_what_peft_does(fields: dict[str, Any]) -> None:
    knobs = {"method.use_qalora": True, "method.qalora_group_size": 8, "method.lora_dropout": 0.1}
    assert_equal("llama", lora("gptq", **fields, set=knobs))


def job_of(method: str, fmt: str) -> Job:
    knobs = {f"method.{key}": value for key, value in (methods.example(method) | SMALL.get(method, {})).items()}
    named = knobs.pop("method.target_modules", None)
    takes = "target_modules" in methods.settings_of(method)[0] and method not in WHOLE
    targets = {"target_modules": named if method == "ln_tuning" else ("q_proj", "v_proj", "down_proj")} if takes else {}
    return tiny_job("llama", half(fmt, method=method, **targets, set=knobs))


@pytest.mark.parametrize("fmt", OWN)
@pytest.mark.parametrize("method", TRACED)
def test_a_method_is_what_peft_does_or_peft_fails_too(method: str, fmt: str) -> None:
    job = job_of(method, fmt)
    try:
        estimate(job)
    except RequestError:
        if method != "full":  # which transformers' Trainer refuses (validate_quantization_for_training)
            with pytest.raises(PeftplanError):
                trace(job, mode="real")
        return
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
        ({"set": {"method.use_qalora": True, "method.qalora_group_size": 7}}, "does not divide the 48 inputs"),
        ({"target_modules": "all-linear"}, "name the"),
        ({"set": {"method.init_lora_weights": "pissa"}}, "PEFT starts it from a layer's weight"),
        ({"set": {"method.init_lora_weights": "loftq"}}, "PEFT starts it from a layer's weight"),
        ({"method": "dora"}, "PEFT has no LoRA with use_dora on the layers of gptq"),
        ({"method": "full", "target_modules": None}, "cannot train packed weights"),
    ],
)
def test_what_gptq_cannot_be_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        estimate(tiny_job("llama", lora("gptq", **fields)))


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"format.bits": 3}, "of 4 bits only"),
        ({"format.group_size": 48}, "format.group_size=48: use one of"),
        ({"format.group_size": 32}, "q_proj has 48x48"),
        ({"format.kernel": "marlin"}, "format.kernel=marlin: gptqmodel's kernel has no backward"),
        ({"format.version": "gemv"}, "format.version=gemv: gptqmodel's kernel has no backward"),
    ],
)
def test_what_awq_cannot_be_is_refused(knobs: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        estimate(tiny_job("llama", lora("awq", set=knobs)))
