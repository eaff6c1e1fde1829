"""Every method that chooses modules, with what such methods have in common: each is what PEFT does, or both refuse.

`modules_to_save` of embedding, norms and head, regular expressions, subsets of layers, excluded modules.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan import methods
from peftplan.errors import PeftplanError, RequestError
from peftplan.pipeline import read
from tests.conformance import zoo
from tests.conformance.checks import found
from tests.oracles.equal import AGAIN, PACKED, PLAIN, assert_equal, tiny_job
from tests.test_completeness import peft_types

pytestmark = pytest.mark.trace

OWN_TARGETS = ("trainable_tokens",)
"""Methods that are put on the embedding alone."""
WITH_WEIGHTS = ("frod",)
"""Methods whose sparse matrices a trace sees with weights only: held by tests of their own."""
NORMS = ("ln_tuning",)
"""Methods that are put on norms."""


def adapting() -> list[str]:
    """The methods of PEFT that have target_modules."""
    have = (name for name in methods.names() if "target_modules" in methods.get(name).__dataclass_fields__)
    traced = {*peft_types(), "lora_fa"}
    return [name for name in have if name in traced and name not in (*OWN_TARGETS, *WITH_WEIGHTS)]


def _fields(method: str, **knobs: Any) -> dict[str, Any]:
    """A job of the method's first example, on two kinds of modules, with `knobs` besides."""
    norms = method in NORMS
    names = ["input_layernorm", "norm"] if norms else ["q_proj", "down_proj"]
    targets = knobs.pop("targets", None) or names
    given = {**zoo.settings("method", found("method", method).examples[0]), **_own(method, targets)}
    given.pop("method.target_modules", None)
    settings = {**given, **{f"method.{key}": value for key, value in knobs.items()}}
    return {"method": method, "target_modules": targets, "set": settings}


def _own(method: str, targets: Any) -> dict[str, Any]:
    """What else a method is told of its targets."""
    if method != "ia3":
        return {}
    return {"method.feedforward_modules": ".*down_proj" if isinstance(targets, str) else ["down_proj"]}


def _alike(family: str, fields: dict[str, Any]) -> None:
    """Equal to the trace, or refused by both."""
    try:
        read(tiny_job(family, fields))
    except RequestError:
        from peftplan.instruments.trace import trace

        with pytest.raises(PeftplanError):
            trace(tiny_job(family, fields))
        return
    assert_equal(family, fields)


def _saves(name: str) -> bool:
    return "modules_to_save" in methods.get(name).__dataclass_fields__


@pytest.mark.parametrize("method", [name for name in adapting() if _saves(name)])
def test_modules_to_save(method: str) -> None:
    saved = ["lm_head"] if method in NORMS else ["embed_tokens", "model.norm"]
    _alike("llama", {**AGAIN, **_fields(method, modules_to_save=saved)})


@pytest.mark.parametrize("method", adapting())
def test_targets_by_a_pattern(method: str) -> None:
    pattern = r".*\.[12]\..*input_layernorm" if method in NORMS else r".*\.[12]\..*\.(q|down)_proj"
    _alike("llama", {**PLAIN, **_fields(method, targets=pattern)})


@pytest.mark.parametrize("method", adapting())
@pytest.mark.parametrize("knob", ["layers_to_transform", "exclude_modules"])
def test_a_subset_of_modules(method: str, knob: str) -> None:
    _alike(
        "llama",
        {**PLAIN, **_fields(method, **{knob: {"layers_to_transform": [1]}.get(knob, ["layers.0.self_attn.q_proj"])})},
    )


SAVED = [
    ("llama_biased", PLAIN, ["down_proj"]),
    ("llama_biased", AGAIN, ["layers.1.mlp", "norm"]),
    ("qwen2", AGAIN, ["self_attn"]),
    ("gemma", PLAIN, ["embed_tokens", "lm_head"]),
    ("gemma", AGAIN, ["input_layernorm"]),
    ("qwen2", PACKED, ["norm", "lm_head"]),
    ("qwen2", PACKED, ["down_proj"]),
    ("llama", PLAIN, ["proj"]),
    ("llama", PLAIN, ["layers"]),
]


@pytest.mark.parametrize(("family", "base", "saved"), SAVED, ids=lambda v: v if isinstance(v, str) else None)
def test_what_may_be_saved(family: str, base: dict[str, Any], saved: list[str]) -> None:
    _alike(
        family,
        {
            **base,
            "method": "lora",
            "rank": 3,
            "target_modules": ["q_proj", "up_proj"],
            "set": {"method.modules_to_save": saved},
        },
    )


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_copies_of_tied_modules(saved: list[str]) -> None:
    tied = {"method.modules_to_save": saved, "model.tie_word_embeddings": True}
    _alike("llama", {**AGAIN, "method": "lora", "rank": 3, "target_modules": ["q_proj"], "set": tied})


REFUSED: list[dict[str, Any]] = [
    {"target_modules": r".*\.mlp\..*"},
    {"target_modules": ["self_attn"]},
    {"target_modules": ["q_proj"], "set": {"method.layers_pattern": "layers"}},
    {"target_modules": ["q_proj"], "set": {"method.layers_pattern": "h", "method.layers_to_transform": [1]}},
    {"target_modules": "all-linear", "set": {"method.layers_to_transform": [1]}},
    {"target_modules": ["q_proj"], "set": {"method.modules_to_save": ["q_proj"]}},
    {"method": "delora", "target_modules": ["q_proj"], "set": {"method.modules_to_save": ["norm"]}},
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_both_refuse(fields: dict[str, Any]) -> None:
    asked = {"method": "lora", **PLAIN, **fields}
    with pytest.raises(RequestError):
        read(tiny_job("llama", asked))
    _alike("llama", asked)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "All-Linear"},
        {
            "target_modules": ["q_proj"],
            "set": {"method.layers_pattern": ["h", "layers"], "method.layers_to_transform": 1},
        },
        {"target_modules": ["q_proj"], "set": {"method.layers_to_transform": []}},
    ],
    ids=str,
)
def test_both_take(fields: dict[str, Any]) -> None:
    assert_equal("llama", {"method": "lora", **PLAIN, **fields})
