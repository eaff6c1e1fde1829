"""OSF against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

RANK, PATTERN = "method.effective_rank", "method.rank_pattern"
ROWS: list[Row] = [
    ("llama", {**PLAIN}),
    ("llama_biased", {**AGAIN, "set": {RANK: 13}}),
    ("llama", {**PLAIN, "grad_accum": 2, "target_modules": ("q_proj", "k_proj", "down_proj")}),
    ("llama", {**PLAIN, "target_modules": "all-linear", "set": {"method.modules_to_save": ["lm_head"]}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "set": {RANK: 10}}),
    ("phi3", {**PLAIN, "target_modules": ("qkv_proj", "o_proj", "down_proj")}),
]
HOOKED: list[Row] = [
    ("gemma", {**WIDE, "set": {RANK: 0.75}}),
    ("llama", {**WIDE, "recompute": "full", "target_modules": ("q_proj", "up_proj", "down_proj")}),
    ("qwen2", {**PLAIN, "adapter_dtype": "bf16", "set": {PATTERN: {"layers.1.*q_proj": 5, "mlp": 0.6}}}),
    ("phi3", {**PLAIN, "adapter_dtype": "bf16", "set": {RANK: 7}}),
]
"""Where no adapter is raised to float32, so that the hooks on the gradients run."""


@pytest.mark.parametrize(("family", "fields"), ROWS + HOOKED, ids=name)
def test_osf_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "osf", **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {RANK: 0}}, "1 to 4095 directions"),
        ({"set": {RANK: 4096}}, "1 to 4095 directions"),
        ({"set": {PATTERN: {"(": 3}}}, "not a regular expression"),
        ({"set": {"method.layers_to_transform": [0]}}, "has no such setting"),
        ({"format": "nf4"}, "OSF on 4-bit weights: PEFT factors"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="osf", **fields))
