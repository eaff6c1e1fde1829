"""LoRA's variants of PEFT, several adapters, embeddings and heads against the traced PEFT model."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PACKED, PLAIN, WIDE, assert_equal, name

pytestmark = pytest.mark.trace

INT8 = {**PACKED, "format": "int8"}
BLOCKS = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["o_proj", "down_proj"], "nblocks": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "mica": {"method.init_lora_weights": "mica"},
    "kasa": {"method.kasa_config": {"beta": 0.1}},
    "bdlora": {"method.use_bdlora": BLOCKS},
}
BASES = [("llama_biased", PLAIN), ("qwen2", MIXED), ("gemma", AGAIN), ("llama", {**WIDE, "adapter_dtype": "bf16"})]


def _lora(fields: dict[str, Any], targets: list[str], **settings: Any) -> dict[str, Any]:
    return {"method": "lora", "rank": 4, "target_modules": targets, **fields, "set": settings}


@pytest.mark.parametrize(("family", "base"), BASES, ids=name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_what_peft_does(variant: str, family: str, base: dict[str, Any]) -> None:
    settings = {**VARIANTS[variant], "method.lora_dropout": 0.1}
    assert_equal(family, _lora(base, ["q_proj", "o_proj"], **settings))


COMPRESSED = [{"num_groups": 4}, {"num_groups": 5, "init_type": "batch_average_once"}]


@pytest.mark.parametrize(
    ("family", "base"), [BASES[0], BASES[3], ("qwen2", {**PLAIN, "adapter_dtype": "bf16"})], ids=name
)
@pytest.mark.parametrize("config", COMPRESSED, ids=str)
def test_a_compressed_input(config: dict[str, Any], family: str, base: dict[str, Any]) -> None:
    settings = {"method.velora_config": config, "method.lora_dropout": 0.1}
    assert_equal(family, _lora(base, ["q_proj", "down_proj"], **settings))


ENDS = [*BASES, ("qwen2", PACKED), ("gemma", PACKED)]


@pytest.mark.parametrize(("family", "base"), ENDS, ids=name)
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "down_proj"]], ids=str)
def test_embeddings_and_heads_are_adapted_as_peft_does(family: str, base: dict[str, Any], targets: list[str]) -> None:
    assert_equal(family, _lora(base, targets))


def test_a_frozen_side_of_an_embedding() -> None:
    assert_equal("gemma", _lora(PLAIN, ["embed_tokens", "q_proj"], **VARIANTS["mica"]))


SEVERAL = [
    ("llama_biased", PLAIN, ["q_proj", "embed_tokens"]),
    ("qwen2", MIXED, ["q_proj", "lm_head"]),
    ("gemma", AGAIN, ["down_proj"]),
    ("qwen2", PACKED, ["q_proj"]),
    ("qwen2", INT8, ["q_proj"]),
]
COUNTS = [(3, 1, 1), (2, 2, 2), (3, 2, 1)]


@pytest.mark.parametrize(("family", "base", "targets"), SEVERAL, ids=name)
@pytest.mark.parametrize(("loaded", "active", "trained"), COUNTS)
def test_several_adapters_are_what_peft_holds(
    family: str, base: dict[str, Any], targets: list[str], loaded: int, active: int, trained: int
) -> None:
    counts = {"method.adapters": loaded, "method.active_adapters": active, "method.trained_adapters": trained}
    assert_equal(family, _lora(base, targets, **{**counts, "method.lora_dropout": 0.1}))


@pytest.mark.parametrize(("family", "base"), [("qwen2", MIXED), ("gemma", AGAIN), ("qwen2", PACKED)], ids=name)
def test_several_dora_adapters(family: str, base: dict[str, Any]) -> None:
    counts = {"method.adapters": 3, "method.active_adapters": 2, "method.trained_adapters": 1}
    assert_equal(family, _lora(base, ["q_proj", "down_proj"], **{**counts, "method.use_dora": True}))


@pytest.mark.parametrize(
    "settings",
    [
        {"method.adapters": 3, "method.modules_to_save": ["lm_head"]},
        {"method.adapters": 2, "method.active_adapters": 2, "method.kasa_config": {}},
        {"method.adapters": 2, "method.active_adapters": 2, "method.layers_to_transform": [1]},
    ],
    ids=str,
)
def test_several_with_other_settings(settings: dict[str, Any]) -> None:
    assert_equal("llama", _lora(PLAIN, ["q_proj"], **settings))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.kasa_config": {}, "method.use_dora": True}}, "does not combine use_dora and kasa_config"),
        ({"set": {"method.use_bdlora": {"nblocks": 2}}}, "neither for A nor for B"),
        ({"set": {"method.use_bdlora": {**BLOCKS, "nblocks": 3}}}, "does not divide"),
        ({"set": {"method.init_lora_weights": "mica", "method.lora_bias": True}}, "no bias with init_lora_weights"),
        ({"set": {"method.use_qalora": True}}, "GPTQ weights only"),
        ({"precision": "bf16-mixed", "set": {"method.velora_config": {}}}, "VeLoRA under autocast"),
        ({"set": {"method.velora_config": {"num_groups": 0}}}, "give positive numbers"),
        ({"format": "nf4", "set": {"method.velora_config": {}}}, "no LoRA with velora_config on packed"),
        ({"format": "nf4", "set": {"method.kasa_config": {}}}, "no LoRA with kasa_config on packed"),
        ({"set": {"method.adapters": 2, "method.bias": "all"}}, "without biases only"),
        ({"set": {"method.adapters": 2, "method.active_adapters": 3}}, "active_adapters=3"),
        (
            {"set": {"method.adapters": 2, "method.active_adapters": 2, "method.modules_to_save": ["lm_head"]}},
            "one active adapter",
        ),
        ({"target_modules": ["embed_tokens"], "set": {"method.lora_bias": True}}, "lora_bias on embeddings"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    asked = {"method": "lora", "rank": 4, "target_modules": ["q_proj"], **fields}
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", **asked))


def test_the_names_are_settings_of_lora() -> None:
    kasa, mica, plain = (estimate(make_job(model="llama-7b", method=n)).parameters.trainable for n in
                         ("kasa", "mica", "lora"))  # fmt: skip
    assert (kasa - plain, 2 * mica) == (2 * 32 * 8, plain)
