"""LoRA over layers stacked anew (`layer_replication`) against the traced PEFT model."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peftplan.errors import PeftplanError, RequestError
from peftplan.instruments.trace import trace
from peftplan.job import make_job
from peftplan.pipeline import read
from tests.oracles.equal import AGAIN, COMMON, OWN, PACKED, PLAIN, SIZES, WIDE, assert_equal, name

pytestmark = pytest.mark.trace

TWICE = {"method.layer_replication": [[0, 3], [0, 3]]}
STACKS = [[[0, 2], [1, 3]], [[1, 3]], [[0, 1], [0, 1], [0, 1], [2, 3]]]
BASES = [("llama_biased", PLAIN), ("llama", WIDE), ("gemma", AGAIN)]


def _lora(base: dict[str, Any], targets: list[str], **settings: Any) -> dict[str, Any]:
    return {"method": "lora", "rank": 4, "target_modules": targets, **base, "set": settings}


@pytest.mark.parametrize(("family", "base"), BASES, ids=name)
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_layers_stacked_anew(family: str, base: dict[str, Any], stack: list[list[int]]) -> None:
    assert_equal(family, _lora(base, ["q_proj", "down_proj"], **{"method.layer_replication": stack}))


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (["q_proj"], {"method.modules_to_save": ["down_proj"]}),
        (["q_proj"], {"method.layers_to_transform": [4]}),
        ([], {"method.target_parameters": ["q_proj.weight"]}),
        (["q_proj"], {"method.use_dora": True}),
    ],
    ids=str,
)
def test_with_other_settings(targets: list[str], settings: dict[str, Any]) -> None:
    assert_equal("llama", _lora(PLAIN, targets, **TWICE, **settings))


@pytest.mark.parametrize(
    ("family", "stack", "said"),
    [("llama", [[0, 4]], "no range of the 3 layers"), ("qwen2", [[0, 3], [0, 3]], "by number")],
)
def test_both_refuse(family: str, stack: list[list[int]], said: str) -> None:
    fields = {**COMMON, **_lora(PLAIN, ["q_proj"], **{"method.layer_replication": stack})}
    job = make_job(model=family, config={"model_type": family, **SIZES, **OWN[family]}, **fields)
    with pytest.raises(RequestError, match=said):
        read(job)
    with pytest.raises(PeftplanError):
        trace(job)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"method.bias": "all"}, "trained biases"), ({"method.adapters": 2}, "anew for every adapter")],
)
def test_what_goes_not_with_it(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        read(make_job(model="llama-7b", **_lora(PLAIN, ["q_proj"], **TWICE, **settings)))


def test_packed_layers_are_not_stacked() -> None:
    with pytest.raises(RequestError, match="whose constants PEFT copies"):
        read(make_job(model="llama-7b", **_lora(PACKED, ["q_proj"], **TWICE)))
