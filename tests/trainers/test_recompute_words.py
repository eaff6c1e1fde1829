"""What trainers' configs say of recomputation and offloaded activations: read, and written back to mean the same."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate, trainers
from peftplan.errors import Unsupported
from peftplan.job import Job
from peftplan.trainers import Run

MODEL = "meta-llama/Llama-2-7b-hf"
FULL = {"gradient_checkpointing": True}
ATTENTION = {"recompute.save": ["attention"]}
MOVED = {"recompute.offload": True}
Row = tuple[dict[str, Any], str, dict[str, Any]]
TRL: list[Row] = [
    ({}, "full", {}),
    ({"gradient_checkpointing": False, "activation_offloading": True}, "none", MOVED),
    ({"activation_offloading": True}, "full", MOVED),
    ({**FULL, "gradient_checkpointing_kwargs": {"every_n_layers": 3}}, "every_n", {"recompute.every_n": 3}),
    ({"activation_checkpointing_kwargs": {"every_n_layers": 1, "offload": True}}, "full", MOVED),
    ({"gradient_checkpointing_kwargs": {"selective": True}}, "selective", ATTENTION),
]
AXOLOTL: list[Row] = [
    ({"activation_offloading": True, "adapter": "lora", "lora_r": 8}, "none", MOVED),
    ({"activation_offloading": "legacy"}, "full", MOVED),
    ({"gradient_checkpointing": "offload"}, "full", MOVED),
    ({"activation_offloading": "hidden_states", "adapter": "lora", "lora_r": 8}, "full", MOVED),
    ({"selective_checkpointing": True}, "selective", ATTENTION),
    (
        {"selective_checkpointing": {"save": ["attention"]}, "activation_offloading": "hidden_states"},
        "selective",
        {**ATTENTION, **MOVED},
    ),
]


def recomputed(job: Job) -> tuple[str | None, dict[str, Any]]:
    """The policy and its settings."""
    known = {key: value for key, value in job.settings.items() if key.startswith("recompute.")}
    return job.recompute, {key: value for key, value in known.items() if key != "recompute.use_reentrant"}


@pytest.mark.parametrize(("keys", "policy", "knobs"), TRL, ids=str)
def test_trl(keys: dict[str, Any], policy: str, knobs: dict[str, Any]) -> None:
    trainer = trainers.get("trl")
    job = trainer.read({"model_name_or_path": MODEL, **keys}, name="x.yaml")
    assert recomputed(job) == (policy, knobs)
    assert recomputed(trainer.read(trainer.config(job, Run()), name="x.yaml")) == (policy, knobs)


@pytest.mark.parametrize(("keys", "policy", "knobs"), AXOLOTL, ids=str)
def test_axolotl(keys: dict[str, Any], policy: str, knobs: dict[str, Any]) -> None:
    trainer = trainers.get("axolotl")
    job = trainer.read({"base_model": MODEL, **FULL, **keys}, name="x.yaml")
    assert recomputed(job) == (policy, knobs)
    assert recomputed(trainer.read(trainer.config(job, Run()), name="x.yaml")) == (policy, knobs)


@pytest.mark.parametrize("trainer", ["trl", "axolotl", "torchtune"])
def test_the_option_is_written_and_read_back(trainer: str) -> None:
    known = trainers.get(trainer)
    job = Job(model="meta-llama/Llama-2-7b-hf", method="lora", recompute="full", offload="activations")
    back = known.read(known.config(job, Run()), name="x.yaml")
    assert recomputed(back) == ("full", MOVED)
    assert estimate(back).memory.host_bytes


def test_what_a_trainer_cannot_recompute_is_refused() -> None:
    for trainer in ("trl", "axolotl", "llamafactory", "swift"):
        with pytest.raises(Unsupported, match="recompute"):
            trainers.write_folder(Job(model="llama-7b", recompute="unsloth"), trainer=trainer, run=Run())
