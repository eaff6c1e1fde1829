"""AdaMSS against the traced PEFT model, whose rows are dealt into equal clusters, and what it refuses."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RequestError
from peftplan.instruments.clusters import dealt
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "down_proj")
COUNT, INNER = "method.num_subspaces", "method.subspace_rank"
ROWS: list[Row] = [
    ("llama", {**PLAIN, "rank": 7}),
    ("llama", {**AGAIN, "rank": 100, "set": {COUNT: 3, INNER: 2}}),
    ("llama_biased", {**PLAIN, "rank": 10, "set": {COUNT: 3, INNER: 2}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "rank": 9, "set": {COUNT: 4, INNER: 3}}),
    ("gemma", {**WIDE, "rank": 9, "set": {COUNT: 2}}),
    ("qwen2", {**PLAIN, "adapter_dtype": "bf16", "rank": 9}),
    ("phi3", {**PLAIN, "rank": 6, "set": {COUNT: 20}}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_adamss_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "adamss", "target_modules": targets, **fields})


def test_dealing_rows_leaves_peft_as_it_was() -> None:
    import peft.tuners.adamss.layer as adamss
    import torch

    before = adamss.clustering_Z, "sklearn" in sys.modules
    with dealt():
        index, count = adamss.clustering_Z(torch.zeros(7, 2), 3, 10)
    assert (index.bincount().tolist(), count) == ([3, 2, 2], 3)
    assert (adamss.clustering_Z, "sklearn" in sys.modules) == before


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {INNER: 101}}, "has 100 directions"),
        ({"set": {COUNT: 0}}, "num_subspaces=0"),
        ({"set": {"method.use_dynamic_rank": True}}, "goes by the weights' values"),
        ({"set": {"method.exclude_modules": "q_proj"}}, "has no such setting"),
        ({"format": "nf4"}, "AdaMSS on 4-bit weights: PEFT gives"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="adamss", **fields))
