"""Names of optimizers, and of methods that are full fine-tuning with one."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import methods, optimizers
from peftplan.assemble import build_graph, trained
from peftplan.errors import RequestError
from peftplan.job import make_job
from peftplan.pipeline import estimate, read
from peftplan.planner.search import plan
from peftplan.resolve import resolve
from peftplan.units import DType

SMALL: dict[str, Any] = {"model": "llama-7b", "micro_batch": 1, "seq_len": 256}


@pytest.mark.parametrize(
    ("name", "optimizer"), [("galore", "galore_adamw"), ("apollo", "apollo_adamw"), ("lomo", "lomo")]
)
def test_a_methods_name_is_full_with_its_optimizer(name: str, optimizer: str) -> None:
    named = estimate(**SMALL, method=name)
    spelled = estimate(**SMALL, method="full", optimizer=optimizer)
    assert named.memory.peak_bytes == spelled.memory.peak_bytes
    assert named.parameters == spelled.parameters
    assert any(note.what == "optimizer" and note.value == optimizer for note in named.assumptions)


def test_rank_and_targets_are_the_optimizers() -> None:
    job = make_job(**SMALL, method="galore", rank=64, target_modules=("mlp",))
    case = resolve(job)
    assert (case.optimizer.knob("rank"), case.optimizer.knob("optim_target_modules")) == (64, ("mlp",))
    assert (case.job.rank, case.job.target_modules) == (64, ("mlp",))
    settings = {"optimizer.rank": 64, "optimizer.optim_target_modules": ["mlp"]}
    spelled = make_job(**SMALL, method="full", optimizer="galore_adamw", set=settings)
    assert read(job).estimate.memory.peak_bytes == read(spelled).estimate.memory.peak_bytes


def test_the_resolved_job_gives_the_same_answer() -> None:
    first = estimate(**SMALL, method="galore", rank=32)
    again = estimate(first.job)
    assert (again.memory.peak_bytes, again.job) == (first.memory.peak_bytes, first.job)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "galore", "optimizer": "adamw"}, "contradicts --method galore"),
        ({"method": "lomo", "rank": 4}, "--rank means nothing to method lomo"),
        ({"method": "galore", "rank": 8, "format": "nf4"}, "cannot train packed weights"),
        ({"method": "full", "optimizer": "galore_adamv"}, "galore_adamw"),
        ({"method": "full", "optimizer": "sgd", "set": {"optimizer.momentun": 0.9}}, "momentum"),
        ({"method": "full", "optimizer": "q_galore", "set": {"optimizer.proj_type": "left"}}, "only std"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        estimate(**SMALL, **fields)


def test_lists_say_what_a_name_stands_for() -> None:
    from peftplan.report.lists import rows

    about = {row["name"]: row["about"] for row in rows("methods")}
    assert "optimizer galore_adamw" in str(about["galore"])
    assert methods.optimizer_of("full") is None


def test_every_optimizer_of_transformers_has_a_name_here() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    elsewhere = {"adamw_torch_xla", "adamw_torch_npu_fused"}
    known = {*optimizers.names(), *optimizers.aliases()}
    assert {name.value for name in training_args.OptimizerNames} - elsewhere <= known


def test_bf16_weights_have_bf16_states_and_bitsandbytes_has_fp32_ones() -> None:
    case = resolve(make_job(**SMALL, method="full", dtype="bf16"))
    weights = trained(build_graph(case))
    numel = sum(w.numel * w.copies for w in weights)
    assert {w.dtype for w in weights} == {DType.bfloat16}
    for name, each in (
        ("adamw", 4),
        ("sgd_momentum", 2),
        ("lion", 4),
        ("adamw_32bit", 8),
        ("adamw_master_weights", 12),
    ):
        states = optimizers.make(name, {}).states(weights, "cuda")
        assert sum(s.bytes * s.copies for s in states if not s.host) == each * numel


MEASURED_GB = {"adamw_fused": 51.6, "adamw_8bit": 39.3, "adamw_low_bit": 39.1, "ao_adamw_4bit": 33.2}
"""Peak of full fine-tuning of Llama-2-7B in bf16 with torchtune on an A100, by optimizer (pytorch/ao,
torchao/optim/README.md, 2024-09): the rows differ by states alone, and agree if their GB are 2**30 bytes."""


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_low_bit", "ao_adamw_4bit"])
def test_measured_peaks_differ_by_the_states(name: str) -> None:
    weights = trained(build_graph(resolve(make_job(model="llama-7b", method="full", dtype="bf16"))))

    def states(optimizer: str) -> float:
        knobs = {"fp32_embeddings": False} if optimizer == "adamw_8bit" else {}
        found = optimizers.make(optimizer, knobs).states(weights, "cuda")
        return sum(s.bytes * s.copies for s in found if not s.host) / 2**30

    measured = MEASURED_GB["adamw_fused"] - MEASURED_GB[name]
    assert states("adamw_fused") - states(name) == pytest.approx(measured, abs=0.15)


def test_plans_know_them() -> None:
    found = plan(model="llama-7b", seq_len=512, gpu="a100-80gb,rtx-4090", methods=("galore", "lomo"))
    assert found.best is not None
    assert found.estimate is not None
    assert {entry.job.optimizer for entry in found.ranking} == {"galore_adamw", "lomo"}
    again = estimate(found.best.job)
    assert again.memory.peak_bytes == found.estimate.memory.peak_bytes == found.best.peak_bytes
