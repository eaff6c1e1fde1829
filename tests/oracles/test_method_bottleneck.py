"""LLM-Adapters' series and parallel adapters against traced modules that compute what its code does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from transformers.activations import ACT2FN

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, name
from tests.oracles.reference import assert_as_reference, replace_modules

pytestmark = pytest.mark.trace
FEEDFORWARD = ("gate_proj", "up_proj", "down_proj")
SIZE = 5


class Adapted(torch.nn.Module):  # type: ignore[misc]
    """A frozen linear layer with a bottleneck before, behind or beside it."""

    def __init__(self, base: torch.nn.Linear, place: str, act: str, dropout: float) -> None:
        super().__init__()
        self.base, self.place = base, place
        enters = base.out_features if place == "behind" else base.in_features
        leaves = base.in_features if place == "before" else base.out_features
        self.down = torch.nn.Linear(enters, SIZE, bias=False, dtype=torch.float32)
        self.up = torch.nn.Linear(SIZE, leaves, bias=False, dtype=torch.float32)
        self.act, self.dropout = ACT2FN[act], torch.nn.Dropout(dropout) if dropout else (lambda x: x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear = partial(torch.nn.functional.linear, weight=self.base.weight, bias=self.base.bias)
        if self.place == "before":
            residual, expected = x, x.dtype
            x = x.float()
            out = self.up(self.act(self.down(self.dropout(x)))).to(expected) * 1.0
            out = out + residual
            return linear(out)
        if self.place == "behind":
            x = linear(x)
            residual, expected = x, x.dtype
            x = x.float()
            out = self.up(self.act(self.down(self.dropout(x)))).to(expected) * 1.0
            return out + residual
        result = linear(x)
        expected = result.dtype
        x = x.float()
        out = self.up(self.act(self.down(self.dropout(x)))).to(expected) * 1.0
        return result + out


def adapted(model: torch.nn.Module, names: tuple[str, ...], method: str, **knobs: Any) -> torch.nn.Module:
    def put_on(path: str, base: torch.nn.Linear) -> torch.nn.Module:
        series = "behind" if path.endswith("down_proj") else "before"
        return Adapted(base, series if method == "series_adapter" else "beside", **knobs)

    return replace_modules(model.requires_grad_(False), names, put_on)


ROWS: list[Row] = [
    ("llama", {**PLAIN}),
    ("llama", {**AGAIN, "set": {"method.adapter_dropout": 0.1}}),
    ("gemma", {**WIDE, "set": {"method.non_linearity": "gelu"}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "set": {"method.non_linearity": "relu"}}),
    ("llama_biased", {**PLAIN, "grad_accum": 2}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
@pytest.mark.parametrize("method", ["series_adapter", "llm_adapters_parallel"])
def test_it_is_what_its_code_does(method: str, family: str, fields: dict[str, Any]) -> None:
    names = FEEDFORWARD if method == "series_adapter" else ("q_proj", "down_proj")
    said = {"method.bottleneck_size": SIZE, **fields.get("set", {})}
    act, share = said.get("method.non_linearity", "tanh"), said.get("method.adapter_dropout", 0.0)
    change = partial(adapted, names=names, method=method, act=act, dropout=share)
    assert_as_reference(family, {**fields, "method": method, "target_modules": names, "set": said}, change)


@pytest.mark.parametrize(
    ("method", "targets", "millions", "percent"),
    [
        ("series_adapter", None, 201.3, None),
        ("adapter_p", None, 67.1, 0.99),
        ("llm_adapters_parallel", None, 201.3, None),
        ("llm_adapters_parallel", ("up_proj", "down_proj"), 247.5, 3.54),
    ],
)
def test_llama_7b_trains_what_was_published(
    method: str, targets: tuple[str, ...] | None, millions: float, percent: float | None
) -> None:
    """200M in the code's README (AdapterH, Parallel); 0.99 % and 3.54 % of the adapted model in the table of DoRA's
    authors (arXiv:2402.09353, table 1), who ran it."""
    found = estimate(make_job(model="llama-7b", method=method, target_modules=targets)).parameters
    assert found.trainable == pytest.approx(millions * 1e6, rel=1e-3)
    if percent is not None:
        assert round(100 * found.trainable / found.total, 2) == percent


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "series_adapter", "target_modules": ("q_proj",)}, "go on gate_proj, up_proj, down_proj"),
        ({"method": "series_adapter", "format": "nf4"}, "LLM-Adapters has them on 8-bit weights only"),
        ({"method": "llm_adapters_parallel", "adapter_dtype": "bf16"}, "leave --adapter-dtype out"),
        ({"method": "adapter_h", "set": {"method.non_linearity": "prelu"}}, "non_linearity=prelu is not modelled"),
        ({"method": "adapter_p", "set": {"method.bottleneck_size": 0}}, "must be at least 1"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(**{"model": "llama-7b", **fields}))
