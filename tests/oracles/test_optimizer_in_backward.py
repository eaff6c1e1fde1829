"""Weights updated while backward runs: gradients that die one by one, as in the traced step."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from peftplan.errors import RequestError  # noqa: E402
from peftplan.instruments.trace import trace  # noqa: E402
from peftplan.job import make_job  # noqa: E402
from peftplan.pipeline import estimate, read  # noqa: E402
from tests.oracles.equal import AGAIN, COMMON, OWN, PLAIN, SIZES, WIDE, assert_equal  # noqa: E402

pytestmark = pytest.mark.trace

HOOKS: dict[str, Any] = {"method": "full", "set": {"optimizer.in_backward": True}}
TIED: dict[str, Any] = {**PLAIN, "set": {"model.tie_word_embeddings": True, "optimizer.in_backward": True}}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {**WIDE, **HOOKS}),
    ("llama", {**AGAIN, **HOOKS}),
    ("llama", {**TIED, "method": "full"}),
    ("llama", {**PLAIN, **HOOKS, "optimizer": "rmsprop"}),
    ("qwen2", {**PLAIN, "method": "lora", "set": {"optimizer.in_backward": True}}),
    ("llama", {**PLAIN, "method": "full", "optimizer": "sgd", "set": {"optimizer.momentum": 0.9}}),
    ("llama", {**WIDE, "method": "full", "optimizer": "adafactor_torch"}),
    ("llama", {**PLAIN, "method": "full", "optimizer": "rmsprop"}),
]


def _name(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "-".join(str(value.get(key, "")) for key in ("method", "optimizer", "precision", "recompute"))


@pytest.mark.parametrize(("family", "fields"), CASES, ids=_name)
def test_torchs_optimizers_in_a_whole_step(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, fields)


@pytest.fixture
def lomo(monkeypatch: pytest.MonkeyPatch) -> None:
    """lomo-optim, whose AdaLomo makes its states on a GPU."""
    pytest.importorskip("lomo_optim")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_: self)


@pytest.mark.usefixtures("lomo")
@pytest.mark.parametrize("fields", [PLAIN, WIDE, AGAIN, {**PLAIN, "set": {"model.tie_word_embeddings": True}}])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_lomo_is_equal(family: str, fields: dict[str, Any]) -> None:
    assert_equal(family, {**fields, "method": "full", "optimizer": "lomo"})


@pytest.mark.usefixtures("lomo")
@pytest.mark.parametrize("fields", [PLAIN, WIDE, AGAIN])
def test_adalomo_is_equal_but_for_the_scaled_loss(fields: dict[str, Any]) -> None:
    config = {"model_type": "llama", **SIZES, **OWN["llama"]}
    job = make_job(model="llama", config=config, **{**COMMON, **fields, "method": "full", "optimizer": "adalomo"})
    memory, real = read(job).estimate.memory, trace(job)
    assert (memory.peak_bytes + 4, memory.static_bytes) == (real.peak_bytes, real.static_bytes)


def test_gradients_that_die_do_not_accumulate() -> None:
    with pytest.raises(RequestError, match="--grad-accum 1"):
        estimate(model="llama-7b", method="full", optimizer="galore_adamw_layerwise", grad_accum=2)
    assert estimate(model="llama-7b", method="full", optimizer="lomo", grad_accum=2).memory.peak_bytes


def test_a_gradient_at_a_time_is_less_than_all_and_the_replay_holds_it_too() -> None:
    fields: dict[str, Any] = {"model": "llama-7b", "method": "full", "micro_batch": 1, "gpu": "a100-80gb"}
    whole, one, none = (
        estimate(**fields, optimizer=name).memory for name in ("galore_adamw", "galore_adamw_layerwise", "lomo")
    )
    assert whole.peak_bytes > one.peak_bytes > none.peak_bytes
    for memory in (one, none):
        assert memory.at_peak["gradient"] < 2**29
        assert memory.reserved_bytes is not None
        assert memory.peak_bytes <= memory.reserved_bytes < 1.1 * memory.peak_bytes
