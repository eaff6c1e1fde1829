"""Recompute policies against the model that runs under them: what is kept, what runs again, and the peak."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.oracles.equal import assert_equal

MODEL: dict[str, Any] = {"batching": "exact", "precision": "bf16"}
POLICIES: dict[str, dict[str, Any]] = {
    "every-2": {"recompute": "every_n"},
    "every-3-reentrant": {"recompute": "every_n", "set": {"recompute.every_n": 3, "recompute.use_reentrant": True}},
    "everything-offloaded": {"recompute": "none", "offload": "activations", "seq_len": 64},
    "offloaded": {"recompute": "full", "offload": "activations"},
    "offloaded-reentrant": {
        "recompute": "full",
        "offload": "activations",
        "set": {"recompute.use_reentrant": True},
    },
    "offloaded-every-2": {"recompute": "every_n", "offload": "activations"},
    "offloaded-selective": {"recompute": "selective", "offload": "activations"},
    "torchtitan": {"recompute": "selective"},
    "attention": {"recompute": "selective", "set": {"recompute.save": ["attention"]}},
    "products": {
        "recompute": "selective",
        "set": {"recompute.save": ["mm", "addmm", "bmm"], "recompute.every_second_mm": False},
    },
}
METHODS: dict[str, dict[str, Any]] = {"full": {"method": "full"}, "lora": {"method": "lora", "rank": 4}}


@pytest.mark.trace
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_the_trace(policy: str, method: str, attention: str) -> None:
    assert_equal("llama", laid(POLICIES[policy], METHODS[method], attention=attention))


@pytest.mark.trace
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", [name for name in POLICIES if name.startswith("off")])
def test_outputs_that_die_early_take_the_leaf_along(policy: str, method: str) -> None:
    fields = laid(POLICIES[policy], METHODS[method])
    fields["set"]["loop.outputs_until"] = "loss"
    assert_equal("llama", fields)


def laid(policy: dict[str, Any], method: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The fields of a job under a policy, which builds no cache."""
    settings = {"model.use_cache": False, **policy.get("set", {})}
    return {**MODEL, **method, **policy, "set": settings, **more}
