"""LoRA with rows of tokens, and on tied embeddings and heads, against the traced PEFT model."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.errors import PeftplanError, RequestError
from peftplan.instruments.trace import trace
from peftplan.job import make_job
from peftplan.pipeline import read
from tests.oracles.equal import AGAIN, COMMON, MIXED, PACKED, PLAIN, SIZES, WIDE, assert_equal, name

pytestmark = pytest.mark.trace

TIED = {"model.tie_word_embeddings": True}
ENSURED = {**TIED, "method.ensure_weight_tying": True}
BASES = [("llama", PLAIN), ("gemma", AGAIN), ("qwen2", MIXED), ("qwen2", PACKED), ("llama", WIDE)]


def _lora(base: dict[str, Any], targets: list[str] | str, **settings: Any) -> dict[str, Any]:
    return {"method": "lora", "rank": 4, "target_modules": targets, **base, "set": settings}


ROWS = [
    {"method.trainable_token_indices": [1, 2, 5]},
    {**TIED, "method.trainable_token_indices": [1, 2, 5]},
    {"method.trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}},
    {**TIED, "method.trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}},
    {**TIED, "method.trainable_token_indices": {"model.embed_tokens": [1, 2], "lm_head": [1, 2]}},
]


@pytest.mark.parametrize(("family", "base"), BASES, ids=name)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows_of_tokens(family: str, base: dict[str, Any], rows: dict[str, Any]) -> None:
    assert_equal(family, _lora(base, ["q_proj"], **rows))


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (["lm_head"], {**TIED, "method.trainable_token_indices": [1]}),
        (["q_proj"], {"method.trainable_token_indices": [1], "method.modules_to_save": ["lm_head"]}),
        (["q_proj"], {"method.trainable_token_indices": [1], "method.adapters": 3}),
    ],
    ids=str,
)
def test_rows_with_other_settings(targets: list[str], settings: dict[str, Any]) -> None:
    assert_equal("llama", _lora(PLAIN, targets, **settings))


ENDS: list[tuple[list[str] | str, list[str] | None]] = [
    (["embed_tokens"], None),
    (["lm_head", "q_proj"], None),
    (r".*embed_tokens", None),
    (["q_proj"], ["lm_head"]),
    (["q_proj"], ["embed_tokens", "lm_head"]),
]


@pytest.mark.parametrize(("family", "base"), BASES, ids=name)
@pytest.mark.parametrize(("targets", "saved"), ENDS, ids=str)
def test_tied_ends_are_kept_tied(
    family: str, base: dict[str, Any], targets: list[str] | str, saved: list[str] | None
) -> None:
    copies = {"method.modules_to_save": saved} if saved else {}
    assert_equal(family, _lora(base, targets, **ENSURED, **copies))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_tied_ends_are_adapted_apart_where_nobody_asks(targets: list[str]) -> None:
    assert_equal("gemma", _lora(PLAIN, targets, **TIED))


def test_a_frozen_side_is_tied_too() -> None:
    settings = {**ENSURED, "method.rank_pattern": {"lm_head": 2}, "method.init_lora_weights": "mica"}
    assert_equal("llama", _lora(WIDE, ["embed_tokens"], **settings))


REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (["embed_tokens"], {"method.trainable_token_indices": [1]}, "not adapted or saved"),
    (["lm_head"], {**ENSURED, "method.modules_to_save": ["embed_tokens"]}, "the head is adapted"),
    (
        ["q_proj"],
        {**ENSURED, "method.trainable_token_indices": {"embed_tokens": [1], "lm_head": [3]}},
        "train the same rows",
    ),
    (
        ["q_proj"],
        {"method.trainable_token_indices": [1], "method.modules_to_save": ["embed_tokens"]},
        "not adapted or saved",
    ),
    (
        ["q_proj"],
        {"method.trainable_token_indices": [1], "method.adapters": 2, "method.active_adapters": 2},
        "one active adapter",
    ),
    (
        ["q_proj"],
        {**TIED, "method.trainable_token_indices": [1], "method.modules_to_save": ["lm_head"]},
        "not adapted or saved",
    ),
]


@pytest.mark.parametrize(("targets", "settings", "said"), REFUSED, ids=str)
def test_both_refuse(targets: list[str], settings: dict[str, Any], said: str) -> None:
    config = {"model_type": "llama", **SIZES}
    job = make_job(model="llama", config=config, **{**COMMON, **_lora(PLAIN, targets, **settings)})
    with pytest.raises(RequestError, match=said):
        read(job)
    with pytest.raises(PeftplanError):
        trace(job)
