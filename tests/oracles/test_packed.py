"""Every method on packed weights: what PEFT does there, to the byte, or refused where PEFT fails too."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import torch

from peftplan import methods
from peftplan.errors import PeftplanError, RequestError
from peftplan.instruments import build
from peftplan.instruments.hooks import quiet
from peftplan.instruments.trace import trace
from peftplan.job import Job, make_job
from peftplan.pipeline import estimate
from tests.oracles.equal import COMMON, SIZES, assert_equal

pytestmark = pytest.mark.trace

TARGETS = ("q_proj", "v_proj", "down_proj")
SMALL: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 50},
    "frod": {"progressbar": False},
    "oft": {"oft_block_size": 8},
    "road": {"group_size": 8},
    "supertuning": {"sparsity": 0.9},
    "trainable_tokens": {"token_indices": [1, 2]},
    "unilora": {"theta_d_length": 64},
    "vblora": {"vector_length": 8, "num_vectors": 16},
}
"""Settings that fit a tiny model, where a method's first example does not."""
SILENT = {("hra", "int8"), ("unilora", "nf4"), ("unilora", "int8")}
"""Refused here although PEFT runs: what it computes is not the method, as the tests below show."""


def fields(method: str, fmt: str) -> dict[str, Any]:
    """A job's own fields; half of the formats with a padding mask."""
    knobs = {f"method.{key}": value for key, value in (methods.example(method) | SMALL.get(method, {})).items()}
    named = knobs.pop("method.target_modules", None)
    takes = "target_modules" in methods.settings_of(method)[0] and method != "trainable_tokens"
    targets = {"target_modules": named if method == "ln_tuning" else TARGETS} if takes else {}
    batching = "padded" if fmt == "nf4" else "exact"
    job = {"method": method, "format": fmt, "precision": "bf16", "dtype": "bf16", "recompute": "none"}
    more = {"format.double_quant": True} if fmt == "nf4" else {}
    return {**job, "batching": batching, **targets, "set": {**knobs, **more}}


def tiny(method: str, fmt: str) -> Job:
    config = {"model_type": "llama", **SIZES}
    return make_job(model="llama", config=config, **{**COMMON, **fields(method, fmt)})


TRACED = [name for name in methods.names() if {"PEFT", "transformers"} & {*methods.get(name).libraries}]
"""What the trace can build here."""


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
@pytest.mark.parametrize("method", TRACED)
def test_a_method_is_what_peft_does_or_peft_fails_too(method: str, fmt: str) -> None:
    job = tiny(method, fmt)
    if not refused(job):
        assert_equal("llama", fields(method, fmt))
    elif (method, fmt) not in SILENT:
        with pytest.raises(PeftplanError):
            trace(job, mode="real")


def refused(job: Job) -> bool:
    try:
        estimate(job)
    except RequestError:
        return True
    return False


def adapted(method: str, fmt: str) -> Any:
    """The first query projection of a model with weights."""
    choices = build.decide(tiny(method, fmt))
    with quiet():
        model: Any = build.apply_method(build.base_model(choices, "real"), choices)
    return model.base_model.model.model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_unilora_holds_scales_of_zero(fmt: str) -> None:
    layer = adapted("unilora", fmt)
    assert not layer.unilora_scales_A["default"].any()
    assert not layer.unilora_scales_B["default"].any()


def test_hra_starts_from_another_layer_on_int8() -> None:
    layer = adapted("hra", "int8")
    x = torch.ones(1, 3, 48)
    plain = layer.base_layer(x)
    assert (layer(x) - plain).abs().max() > 10 * plain.abs().max()
