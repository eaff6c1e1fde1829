"""WaveFT against the traced PEFT model, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan.errors import OutsideError, RequestError
from peftplan.instruments.trace import trace
from peftplan.job import make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import AGAIN, COMMON, MIXED, PACKED, PLAIN, SIZES, WIDE, Row, assert_equal, name

pytestmark = pytest.mark.trace

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "down_proj")
COUNT, FAMILY, WAVES, SHARED = (
    f"method.{name}" for name in ("n_frequency", "wavelet_family", "use_idwt", "proportional_parameters")
)
ODD = {"method.n_frequency_pattern": {"layers.1.mlp.down_proj": 7}}
ROWS: list[Row] = [
    ("llama", {**PLAIN, "set": {COUNT: 20}}),
    ("llama_biased", {**AGAIN, "set": {COUNT: 30, FAMILY: "coif1", **ODD}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "set": {COUNT: 30, FAMILY: "sym4"}}),
    ("qwen2", {**MIXED, "dtype": "bf16", "set": {COUNT: 30, WAVES: False}}),
    ("gemma", {**WIDE, "set": {COUNT: 30, SHARED: True}}),
    ("qwen2", {**PLAIN, "adapter_dtype": "bf16", "set": {COUNT: 30, WAVES: False}}),
    ("phi3", {**PLAIN, "set": {COUNT: 30, FAMILY: "db3"}}),
    ("llama", {**PACKED, "set": {COUNT: 30}}),
    ("llama", {**PACKED, "format": "int8", "set": {COUNT: 30}}),
]


def _odd(**changes: Any) -> Any:
    """A job whose weights have an odd side."""
    config = {"model_type": "llama", **SIZES, "intermediate_size": 87}
    fields = {"method": "waveft", "target_modules": TARGETS, "set": {COUNT: 20, **changes}}
    return make_job(model="tiny", config=config, **{**COMMON, **PLAIN, **fields})


@pytest.mark.parametrize(("family", "fields"), ROWS, ids=name)
def test_waveft_is_what_peft_does(family: str, fields: dict[str, Any]) -> None:
    targets = FUSED if family == "phi3" else TARGETS
    assert_equal(family, {"method": "waveft", "target_modules": targets, **fields})


def test_odd_sides_are_padded_and_cut_and_values_change_nothing() -> None:
    job = _odd(**{FAMILY: "db2"})
    found, fake, real = estimate(job), trace(job), trace(job, mode="real")
    assert found.memory.saved_for_backward_bytes == fake.saved_for_backward_bytes == real.saved_for_backward_bytes
    assert found.memory.peak_bytes == fake.peak_bytes == real.peak_bytes
    assert found.flops.backward == fake.flops["backward"] == real.flops["backward"]


def test_wavelets_that_peft_cannot_run_are_refused() -> None:
    job = _odd(**{FAMILY: "coif5"})
    with pytest.raises(OutsideError):
        trace(job)
    with pytest.raises(RequestError, match="wavelet_family=coif5"):
        estimate(job)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"set": {COUNT: 0}}, "has room for"),
        ({"set": {FAMILY: "db11"}}, "works with db1, db2"),
    ],
)
def test_it_says_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        estimate(make_job(model="llama-7b", method="waveft", **fields))
