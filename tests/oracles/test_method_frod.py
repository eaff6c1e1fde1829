"""FRoD against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

TARGETS = ("q_proj", "v_proj", "down_proj")
DROPPED = {"method.frod_dropout": 0.1}
ROWS: list[Row] = [
    ("llama", PLAIN),
    ("llama", WIDE),
    ("llama", {**PLAIN, "adapter_dtype": "bf16"}),
    ("llama_biased", {**WIDE, "set": DROPPED}),
    ("qwen2", {**AGAIN, "set": {"method.sparse_rate": 0.05, "method.runtime_offload_base_weight": True}}),
    ("qwen2", {**PLAIN, "set": DROPPED}),
    ("gemma", {**MIXED, "dtype": "bf16"}),
]


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_frod_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    """With weights: PEFT decomposes them, and its sparse matrices have no storage without values."""
    quiet = {**fields.get("set", {}), "method.progressbar": False}
    assert_equal(family, {"method": "frod", "target_modules": TARGETS, **fields, "set": quiet})


def test_offloaded_weights_are_not_on_the_gpu() -> None:
    def peak(*, away: bool) -> int:
        knobs = {"method.runtime_offload_base_weight": away}
        job = make_job(model="llama-7b", method="frod", target_modules="q_proj", recompute="full", set=knobs)
        return estimate(job).memory.static_bytes

    assert peak(away=False) - peak(away=True) == 32 * 4096 * 4096 * 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {"method.sparse_rate": 0}}, "sparse_rate=0"),
        ({"set": {"method.exclude_modules": "q_proj"}}, "has no such setting"),
        ({"format": "nf4"}, "integers cannot train"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="frod", **fields))
