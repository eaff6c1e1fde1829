"""LLaMA-Pro against a traced model expanded as ms-swift does it, and against the expanded checkpoint's size."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest

pytest.importorskip("peft")

import torch

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, name
from tests.oracles.reference import assert_as_reference, layers_of

pytestmark = pytest.mark.trace
ONE: dict[str, Any] = {"method.num_new_blocks": 1}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": ONE}),
    ("llama", {**AGAIN, "set": {"method.num_new_blocks": 3}}),
    ("qwen2", {**MIXED, "dtype": "fp32", "set": {"method.num_new_blocks": 3, "method.num_groups": 2}}),
    ("gemma", {**WIDE, "set": {**ONE, "method.expand": False, "method.train": ("model.norm",)}}),
    ("phi3", {**PLAIN, "set": {"method.num_new_blocks": 3}, "grad_accum": 2}),
]


def expanded(model: torch.nn.Module, stride: int) -> torch.nn.Module:
    """A frozen model with a copy behind every `stride` layers, which trains."""
    model.requires_grad_(False)
    stack = torch.nn.ModuleList()
    for number, layer in enumerate(layers_of(model), start=1):
        stack.append(layer)
        if number % stride == 0:
            stack.append(deepcopy(layer).requires_grad_(True))
    for index, layer in enumerate(stack):
        layer.self_attn.layer_idx = index
    model.model.layers = stack
    config: Any = model.config
    config.num_hidden_layers = len(stack)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * len(stack)
    return model


def last(model: torch.nn.Module) -> torch.nn.Module:
    model.requires_grad_(False)
    layers_of(model)[-1].requires_grad_(True)
    model.get_submodule("model.norm").requires_grad_(True)
    return model


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_it_is_the_expanded_model_with_the_copies_trained(family: str, fields: dict[str, Any]) -> None:
    said = fields["set"]
    stride = 3 // (said.get("method.num_groups") or said["method.num_new_blocks"])
    change = partial(expanded, stride=stride) if said.get("method.expand", True) else last
    assert_as_reference(family, {"method": "llama_pro", **fields}, change)


def test_the_paper_makes_8_3_billion_of_llama_2_7b() -> None:
    """Section 4.1: 32 blocks become 40; the checkpoint it publishes has as many as a config of 40 layers."""
    layer = 4 * 4_096**2 + 3 * 4_096 * 11_008 + 2 * 4_096
    found = estimate(make_job(model="llama-2-7b", method="llama_pro")).parameters
    assert 8.3e9 < found.total < 8.4e9
    assert found.trainable == 8 * layer
    forty = {"model.num_hidden_layers": 40, "method.expand": False}
    assert estimate(make_job(model="llama-2-7b", method="llama_pro", set=forty)).parameters == found


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.num_new_blocks": 5}}, "does not divide the model's 32 layers"),
        ({"set": {"method.num_new_blocks": 0}}, "use 1 to 32"),
        ({"set": {"method.expand": False, "method.num_groups": 4}}, "leave it out with method.expand=false"),
        ({"set": {"method.train": ("q_proj",)}}, "'q_proj' is not one of model.norm"),
        ({"format": "nf4"}, "cannot train packed weights"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="llama_pro", **fields))
