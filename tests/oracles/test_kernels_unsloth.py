"""Unsloth's kernels: predicted, and traced with functions that keep what its own keep."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import torch
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast

from peftplan.errors import RequestError
from peftplan.graph.core import Tensor
from peftplan.instruments import build
from peftplan.instruments.answer import Trace
from peftplan.kernels import unsloth
from peftplan.pipeline import estimate, read
from peftplan.units import DType
from tests.oracles import unsloth_functions as own
from tests.oracles.equal import OWN, SIZES, Row, name, predicted, tiny_job, traced
from tests.oracles.reference import reference

pytestmark = pytest.mark.trace
MIXED: dict[str, Any] = {"precision": "bf16-mixed", "dtype": "bf16", "batching": "exact", "recompute": "none"}
LORA: dict[str, Any] = {**MIXED, "method": "lora", "rank": 4, "target_modules": "all-linear"}
QLORA: dict[str, Any] = {**LORA, "format": "nf4"}
SET = {"format.double_quant": True, "format.prepare": False, "model.use_cache": False}
DROPPED = {"method.lora_dropout": 0.1}
ROWS: list[Row] = [
    ("llama", {**LORA, "set": {"model.use_cache": False}}),
    ("llama", {**QLORA, "set": SET}),
    ("mistral", {**QLORA, "recompute": "full", "set": {**SET, **DROPPED}}),
    ("qwen3", {**QLORA, "target_modules": ("q_proj", "k_proj", "v_proj", "down_proj"), "set": SET}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_unsloth_is_what_its_functions_do(family: str, fields: dict[str, Any]) -> None:
    job = tiny_job(family, {**fields, "kernels": "unsloth"})

    def patched(model: Any) -> torch.nn.Module:
        model.forward = MethodType(_forward, model)
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(lambda self, x: own.RMSNorm.apply(x, self.weight), module)
        adapted = build._adapt(model, build.decide(job))
        if job.format:
            _hold(adapted)
        for module in adapted.modules():
            _fuse(adapted, module)
        return adapted

    with pytest.MonkeyPatch.context() as patch:
        modeling = f"transformers.models.{family}.modeling_{family}.apply_rotary_pos_emb"
        patch.setattr(modeling, lambda q, k, cos, sin, **_: own.Rope.apply(q, k, cos, sin))
        real = reference(job, patched)
    _assert_same(real, predicted(read(job).estimate))


def _assert_same(real: Trace, guess: dict[str, int]) -> None:
    """The same numbers, but that casts of A and B within a function may raise the peak by a percent."""
    found = traced(real)
    assert {**guess, "peak": 0} == {**found, "peak": 0}
    assert abs(guess["peak"] - found["peak"]) <= 0.01 * found["peak"]


def _forward(model: Any, **batch: Any) -> CausalLMOutputWithPast:
    """CausalLM_fast_forward."""
    labels = batch.pop("labels")
    hidden = model.model(**batch)[0]
    padded = functional.pad(labels, (0, 1), value=-100)
    targets = padded[..., 1:].contiguous().view(-1)
    head = model.lm_head.weight
    rows = hidden.view(-1, hidden.shape[-1])
    shapes = (Tensor("", tuple(t.shape), DType.bfloat16) for t in (rows, head))
    return CausalLMOutputWithPast(loss=own.Loss.apply(rows, head, targets, unsloth._tile_bytes(*shapes)))


def _hold(model: Any) -> None:
    """WEIGHT_BUFFERS and ABSMAX_BUFFERS, as large as the largest weight."""
    sizes = [m.base_layer.in_features * m.base_layer.out_features for m in model.modules() if hasattr(m, "lora_A")]
    largest = max(max(sizes), SIZES["hidden_size"] * SIZES["intermediate_size"])
    for label, size, dtype in (("whole", largest, torch.bfloat16), ("absmax", largest // 64, torch.float32)):
        model.register_buffer(label, torch.empty(size, dtype=dtype, device="meta"), persistent=False)


def _part(model: Any, layer: Any) -> own.Part:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return own.Part(
        layer.base_layer, a, b, getattr(layer.lora_dropout["default"], "p", 0.0), model._buffers.get("whole")
    )


def _fuse(model: Any, module: Any) -> None:
    """patch_peft_model: where every projection of a group has an adapter."""
    kind = type(module).__name__
    if kind.endswith("MLP") and _adapted(module, "gate_proj", "up_proj", "down_proj"):
        module.forward = MethodType(lambda self, x: _mlp(model, self, x), module)
    if not kind.endswith("Attention"):
        return
    if _adapted(module, "q_proj", "k_proj", "v_proj"):
        made: dict[str, Any] = {}
        for n in ("q_proj", "k_proj", "v_proj"):
            layer = getattr(module, n)
            layer.forward = MethodType(lambda _, x, mine=n: _qkv(model, module, x, made).pop(mine), layer)
    if _adapted(module, "o_proj"):
        module.o_proj.forward = MethodType(lambda self, x: _single(model, self, x), module.o_proj)


def _adapted(module: Any, *names: str) -> bool:
    return all(hasattr(getattr(module, n), "lora_A") for n in names)


def _mlp(model: Any, module: Any, x: torch.Tensor) -> Any:
    parts = tuple(_part(model, getattr(module, n)) for n in ("gate_proj", "up_proj", "down_proj"))
    return own.Mlp.apply(x, parts, *(t for part in parts for t in (part.a, part.b)))


def _qkv(model: Any, module: Any, x: torch.Tensor, made: dict[str, Any]) -> dict[str, Any]:
    names = ("q_proj", "k_proj", "v_proj")
    if not made:
        parts = tuple(_part(model, getattr(module, n)) for n in names)
        outs = own.QKV.apply(x, parts, *(t for part in parts for t in (part.a, part.b)))
        made.update(zip(names, outs, strict=True))
    return made


def _single(model: Any, layer: Any, x: torch.Tensor) -> Any:
    part = _part(model, layer)
    return own.Single.apply(x, part, part.a, part.b)


def test_other_models_and_methods_are_refused() -> None:
    config = {"model_type": "phi3", **SIZES, **OWN["phi3"]}
    with pytest.raises(RequestError, match="no kernels of its own for phi3"):
        estimate(model="x", config=config, kernels="unsloth")
    with pytest.raises(RequestError, match="not ia3; use --kernels hf"):
        estimate(model="llama-7b", method="ia3", kernels="unsloth")


def test_what_is_not_plain_lora_is_left_to_peft() -> None:
    def kept(**fields: Any) -> int:
        answer = estimate(model="llama-7b", method="lora", kernels="unsloth", target_modules="all-linear", **fields)
        return answer.memory.saved_for_backward_bytes

    plain = kept()
    assert kept(set={"method.use_dora": True}) > plain
    assert kept(set={"method.bias": "all"}) == kept(set={"method.bias": "lora_only"})
