"""Adapters that undo autocast over an fp32 base: what reads their outputs reads fp32, as in the traced model."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan import methods, plugins
from peftplan.methods._branches import OnLinears
from tests.oracles.equal import MIXED, assert_equal
from tests.oracles.test_packed import SMALL

pytestmark = pytest.mark.trace

OVER: dict[str, Any] = {**MIXED, "dtype": "fp32"}
FULL: dict[str, Any] = {**OVER, "recompute": "full", "batching": "padded", "attention": "eager"}
ONE: dict[str, Any] = {**OVER, "set": {"method.layers_to_transform": [1]}}


def widening() -> list[str]:
    """The methods whose outputs are cast to their inputs' dtype."""
    classes = {name: methods.get(name) for name in plugins.names(methods.__name__)}
    return [name for name, cls in classes.items() if issubclass(cls, OnLinears) and cls.returns_input]


def knobs(method: str) -> dict[str, Any]:
    found = {f"method.{key}": value for key, value in (methods.example(method) | SMALL.get(method, {})).items()}
    found.pop("method.target_modules", None)
    return found


@pytest.mark.parametrize("method", widening())
def test_a_method_hands_on_its_inputs_dtype(method: str) -> None:
    fields = {**OVER, "method": method, "target_modules": ("q_proj", "v_proj", "down_proj"), "set": knobs(method)}
    assert_equal("llama", fields)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen2", {**OVER, "target_modules": "all-linear"}),
        ("phi3", {**OVER, "target_modules": "all-linear"}),
        ("gemma", {**FULL, "target_modules": "k_proj,up_proj"}),
        ("llama_biased", {**ONE, "target_modules": "v_proj,gate_proj,o_proj"}),
    ],
)
def test_whatever_layers_are_adapted(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "vera", "rank": 5, **fields})
