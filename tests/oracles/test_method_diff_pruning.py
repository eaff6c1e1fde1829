"""Diff pruning against traced modules that compute the paper's equations."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

pytest.importorskip("peft")

import torch

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, name
from tests.oracles.reference import assert_as_reference, replace_modules

pytestmark = pytest.mark.trace
LOW, HIGH = -1.5, 1.5
ROWS: list[Row] = [
    ("llama", {**PLAIN}),
    ("llama", {**AGAIN, "grad_accum": 2}),
    ("qwen2", {**MIXED, "dtype": "bf16"}),
    ("gemma", {**WIDE, "set": {"method.structured": False}}),
]
TARGETS = ("q_proj", "v_proj", "down_proj")


def gate(alpha: torch.Tensor) -> torch.Tensor:
    """A stretched binary concrete variable."""
    u = torch.rand_like(alpha)
    s = torch.sigmoid(torch.log(u) - torch.log(1 - u) + alpha)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


class Gated(torch.nn.Module):  # type: ignore[misc]
    """A linear layer whose weight is changed by gated differences."""

    def __init__(self, base: torch.nn.Linear, *, structured: bool) -> None:
        super().__init__()
        self.base = base
        self.alpha = torch.nn.Parameter(torch.zeros_like(base.weight, dtype=torch.float32))
        if structured:
            self.group_alpha = torch.nn.Parameter(torch.zeros(1, dtype=torch.float32))
        self.diff = torch.nn.Parameter(torch.zeros_like(base.weight, dtype=torch.float32))
        self.structured = structured

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = gate(self.alpha)
        if self.structured:
            z = z * gate(self.group_alpha)
        weight = (self.base.weight + z * self.diff).to(self.base.weight.dtype)
        return torch.nn.functional.linear(x, weight, self.base.bias)


def gated(model: torch.nn.Module, *, structured: bool) -> torch.nn.Module:
    model.requires_grad_(False)
    return replace_modules(model, TARGETS, lambda _, base: Gated(base, structured=structured))


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_it_is_what_the_paper_says(family: str, fields: dict[str, Any]) -> None:
    change = partial(gated, structured=fields.get("set", {}).get("method.structured", True))
    assert_as_reference(family, {"method": "diff_pruning", "target_modules": TARGETS, **fields}, change)


def test_the_paper_keeps_half_a_percent() -> None:
    """Its abstract: 0.5 % of the weights per task. Of LLaMA-2-7B's linear layers 32 million, of 2 x 6.5 billion that
    train, and a gate for each of 32 x 7 layers."""
    linear = 32 * (4 * 4_096**2 + 3 * 4_096 * 11_008)
    answer = estimate(make_job(model="llama-2-7b", method="diff_pruning", micro_batch=1))
    assert answer.parameters.trainable == 2 * linear + 32 * 7
    changed = next(a for a in answer.assumptions if a.what == "parameters.changed")
    assert changed.value == round(0.005 * linear)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.target_sparsity": 1.0}}, "target_sparsity=1.0"),
        ({"format": "nf4"}, "diff pruning on 4-bit weights: it changes weights one by one"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="diff_pruning", **fields))
