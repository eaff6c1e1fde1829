"""fms-acceleration's fused operations: predicted, and traced with functions that keep what its own keep."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import torch

from peftplan.errors import RequestError
from peftplan.instruments import build
from peftplan.pipeline import estimate, read
from tests.oracles import kernel_functions as kernels
from tests.oracles import lora_functions as fused
from tests.oracles.equal import Row, assert_same, name, tiny_job
from tests.oracles.reference import reference

pytestmark = pytest.mark.trace
MIXED: dict[str, Any] = {"precision": "bf16-mixed", "dtype": "bf16", "batching": "exact", "recompute": "none"}
QLORA: dict[str, Any] = {
    **MIXED, "method": "lora", "rank": 4, "format": "nf4", "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
}  # fmt: skip
SET = {"format.double_quant": True, "format.prepare": False, "loss.style": "shifted_logits", "model.use_cache": False}
ROWS: list[Row] = [
    ("llama", {**QLORA, "set": SET}),
    ("llama", {**QLORA, "set": {**SET, "method.lora_dropout": 0.1}}),
    ("mistral", {**QLORA, "recompute": "full", "set": {**SET, "method.lora_dropout": 0.1}}),
    ("llama", {**MIXED, "method": "lora", "rank": 4, "set": {k: v for k, v in SET.items() if "format" not in k}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_foak_is_what_its_functions_do(family: str, fields: dict[str, Any]) -> None:
    job = tiny_job(family, {**fields, "kernels": "foak"})
    packed = job.format == "nf4"

    def patched(model: torch.nn.Module) -> torch.nn.Module:
        _patch(model)
        model = build._adapt(model, build.decide(job))
        for layer in model.modules() if packed else ():
            if type(layer).__name__.endswith("Attention"):
                _fuse(layer)
        return model

    with pytest.MonkeyPatch.context() as patch:
        modeling = f"transformers.models.{family}.modeling_{family}.apply_rotary_pos_emb"
        patch.setattr(modeling, lambda q, k, cos, sin, **_: fused.fast_rope(q, k, cos, sin))
        real = reference(job, patched)
    assert_same(real, read(job).estimate)


def _patch(model: Any) -> None:
    model.loss_function = fused.fast_causal_loss
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(lambda self, x: kernels.RMSNorm.apply(x, self.weight), module)


def _fuse(attention: Any) -> None:
    """models/utils.py, build_lora_fused_ops: the first of q, k, v that is called computes all three."""
    made: dict[str, Any] = {}
    names = ("q_proj", "k_proj", "v_proj")

    def one(module: Any, x: torch.Tensor, own: str) -> Any:
        del module
        if not made:
            layers = tuple(fused.parts(getattr(attention, n)) for n in names)
            weights = tuple(t for _, a, b, _ in layers for t in (a, b))
            made.update(zip(names, fused.QKV.apply(x, layers, *weights), strict=True))
        return made.pop(own)

    for n in names:
        layer = getattr(attention, n)
        layer.forward = MethodType(lambda self, x, own=n: one(self, x, own), layer)
    attention.o_proj.forward = MethodType(_single, attention.o_proj)


def _single(layer: Any, x: torch.Tensor) -> Any:
    parts = fused.parts(layer)
    return fused.Single.apply(x, parts, parts[1], parts[2])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "qwen2.5-7b"}, "no fused operations for qwen2"),
        ({"method": "qlora"}, "requires mixed precision"),
        ({"method": "lora", "format": "int8", "precision": "bf16-mixed"}, "takes bitsandbytes' NF4 or AutoGPTQ"),
        ({"set": {"kernels.fast_loss": "fused_ce_liger", "loss.style": "shifted_logits"}}, "the loss is that of"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(**{"model": "llama-7b", "kernels": "foak", **fields})
