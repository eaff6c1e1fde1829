"""Liger's kernels on transformers' models: predicted, and traced with functions that keep what Liger's keep."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from torch.nn import functional

from peftplan.errors import RequestError
from peftplan.instruments import build
from peftplan.pipeline import estimate, read
from tests.oracles import kernel_functions as kernels
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, assert_same, name, tiny_job
from tests.oracles.reference import reference

pytestmark = pytest.mark.trace
LORA: dict[str, Any] = {"method": "lora", "rank": 4}
FULL: dict[str, Any] = {"method": "full"}
NO_CACHE = {"model.use_cache": False}
ROWS: list[Row] = [
    ("llama", {**LORA, **PLAIN}),
    ("llama", {**LORA, **PLAIN, "target_modules": ("q_proj",), "set": NO_CACHE}),
    ("llama", {**LORA, **AGAIN}),
    ("llama", {**LORA, **MIXED, "dtype": "bf16"}),
    ("llama", {**LORA, **WIDE, "attention": "eager", "target_modules": "all-linear"}),
    ("qwen3", {**FULL, **PLAIN}),
    ("qwen2", {**FULL, **WIDE}),
    ("gemma", {**FULL, **AGAIN}),
    ("phi3", {**LORA, **PLAIN, "target_modules": "all-linear"}),
    ("mistral", {**FULL, **MIXED}),
    ("llama", {**FULL, **PLAIN, "set": {"kernels.rope": False, "kernels.swiglu": False}}),
    ("llama", {**LORA, **PLAIN, "set": {"kernels.rms_norm": False, "kernels.fused_linear_cross_entropy": False}}),
    (
        "llama",
        {**FULL, **PLAIN, "set": {"kernels.cross_entropy": True, "kernels.fused_linear_cross_entropy": False}},
    ),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_liger_is_what_its_functions_do(family: str, fields: dict[str, Any]) -> None:
    job = tiny_job(family, {**fields, "kernels": "liger"})
    chosen = {"rope", "rms_norm", "swiglu", "fused_linear_cross_entropy"}
    for key, value in job.knobs("kernels").items():
        chosen = chosen | {key} if value else chosen - {key}

    def patched(model: torch.nn.Module) -> torch.nn.Module:
        model = model.requires_grad_(True)
        _patch(model, chosen)
        return model if job.method == "full" else build._adapt(model, build.decide(job))

    with _functions(family, chosen):
        real = reference(job, patched)
    assert_same(real, read(job).estimate)


def _patch(model: Any, chosen: set[str]) -> None:
    """What apply_liger_kernel_to_* does to an instance."""
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm") and "rms_norm" in chosen:
            module.forward = MethodType(lambda self, x: kernels.RMSNorm.apply(x, self.weight), module)
        if kind.endswith("MLP") and "swiglu" in chosen:
            module.forward = MethodType(_fused_halves if kind == "Phi3MLP" else _gated, module)
    if "fused_linear_cross_entropy" in chosen:
        model.forward = MethodType(kernels.fused_forward, model)


def _gated(self: Any, x: torch.Tensor) -> Any:
    return self.down_proj(kernels.GatedProduct.apply(self.gate_proj(x), self.up_proj(x)))


def _fused_halves(self: Any, x: torch.Tensor) -> Any:
    up = self.gate_up_proj(x)
    gate, up = up.chunk(2, dim=-1)
    return self.down_proj(kernels.GatedProduct.apply(gate, up))


@contextmanager
def _functions(family: str, chosen: set[str]) -> Iterator[None]:
    """And to functions of modules."""
    with pytest.MonkeyPatch.context() as patch:
        modeling = sys.modules.get(f"transformers.models.{family}.modeling_{family}")
        if modeling is None:
            __import__(f"transformers.models.{family}.modeling_{family}")
            modeling = sys.modules[f"transformers.models.{family}.modeling_{family}"]
        if "rope" in chosen:
            patch.setattr(modeling, "apply_rotary_pos_emb", lambda *qkcs, **_: kernels.Rope.apply(*qkcs[:4]))
        if "cross_entropy" in chosen:
            own = lambda scores, targets, **_: kernels.CrossEntropy.apply(scores, targets)  # noqa: E731
            patch.setattr(functional, "cross_entropy", own)
        yield


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"kernels.cross_entropy": True}}, "cannot both be true"),
        ({"set": {"loss.style": "shifted_logits"}}, "the loss is that of --kernels liger"),
        ({"set": {"kernels.layer_norm": True}}, "layer_norm"),
        ({"kernels": "ligre"}, "liger"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(**{"model": "llama-7b", "kernels": "liger", **fields})


def test_kernels_lower_the_peak() -> None:
    peak = partial(estimate, model="llama-7b", seq_len=512)
    assert peak(kernels="liger").memory.peak_bytes < peak().memory.peak_bytes
