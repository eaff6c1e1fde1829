"""torchao's float8 training: what is kept, computed and made on the way, against the real layers."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import RequestError, estimate
from tests.oracles.equal import assert_equal, tiny_job

FIELDS: dict[str, Any] = {"method": "full", "precision": "fp8", "batching": "exact", "set": {"model.use_cache": False}}
ROWS = [
    ("llama", {}),
    ("llama", {"recompute": "full"}),
    ("llama", {"recompute": "selective", "attention": "eager"}),
    ("qwen2", {"recompute": "full", "set": {"model.use_cache": False, "recompute.use_reentrant": True}}),
]


@pytest.mark.trace
@pytest.mark.parametrize(("family", "fields"), ROWS, ids=str)
def test_equals_the_trace(family: str, fields: dict[str, Any]) -> None:
    pytest.importorskip("torchao")
    sizes = {"model.intermediate_size": 96, "model.vocab_size": 112}
    assert_equal(family, {**FIELDS, **fields, "set": {**FIELDS["set"], **fields.get("set", {}), **sizes}})


def test_it_keeps_what_bf16_keeps_and_computes_as_much() -> None:
    eight, sixteen = (estimate(tiny_job("llama", {**FIELDS, "precision": name})) for name in ("fp8", "bf16"))
    assert eight.memory.saved_for_backward_bytes == sixteen.memory.saved_for_backward_bytes
    assert eight.flops == sixteen.flops
    assert eight.memory.static_bytes == sixteen.memory.static_bytes


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "lora"}, "train the base"),
        ({"gpu": "a100-80gb", "backend": "cuda"}, "8.9"),
        ({"dtype": "fp32"}, "use --dtype bf16"),
    ],
)
def test_what_it_is_not_for_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        estimate(tiny_job("llama", {**FIELDS, **fields}))
