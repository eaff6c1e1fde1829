"""Trainable tokens against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": {"method.token_indices": [1, 2, 5]}}),
    ("llama", {**AGAIN, "set": {"method.token_indices": [1, 2, 5]}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "set": {"method.token_indices": [3, 4]}}),
    ("gemma", {**WIDE, "set": {"method.token_indices": [1]}}),
    ("llama_biased", {**PLAIN, "adapter_dtype": "bf16", "set": {"method.token_indices": [1, 2, 5]}}),
    ("gemma", {**PLAIN, "set": {"method.token_indices": [1], "model.tie_word_embeddings": True}}),
    ("llama", {**AGAIN, "set": {"method.token_indices": [1, 7], "model.tie_word_embeddings": True}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "set": {"method.token_indices": [1, 7], "model.tie_word_embeddings": True}}),
    ("qwen2", {**PACKED, "set": {"method.token_indices": [1, 7], "model.tie_word_embeddings": True}}),
    ("llama", {**PLAIN, "target_modules": ["lm_head"], "set": {"method.token_indices": [1]}}),
    (
        "gemma",
        {
            **AGAIN,
            "target_modules": ["embed_tokens", "lm_head"],
            "set": {"method.token_indices": [1], "model.tie_word_embeddings": False},
        },
    ),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_trainable_tokens_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {"method": "trainable_tokens", **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "say which rows"),
        ({"target_modules": "q_proj", "set": {"method.token_indices": [1]}}, "no rows of tokens"),
        (
            {
                "target_modules": ["embed_tokens", "lm_head"],
                "set": {"method.token_indices": [1], "model.tie_word_embeddings": True},
            },
            "one of two tied modules",
        ),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="trainable_tokens", **fields))
