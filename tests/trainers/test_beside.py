"""Files beside a trainer's config: accelerate's YAML, DeepSpeed's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from peftplan import estimate, trainers
from peftplan.errors import BadFile, RequestError, Unsupported
from peftplan.job import Job
from peftplan.trainers import _accelerate, _deepspeed
from tests.trainers import fixtures
from tests.trainers.spread import MODEL

SFT = fixtures.CONFIGS / "trl" / "cli_example.yaml"
BESIDE = fixtures.CONFIGS / "beside"
POINTER = "deepspeed_config.deepspeed_config_file"
LAYOUTS = {
    "ddp": ("none",),
    "fsdp": ("none", "params+optimizer"),
    "zero1": ("none", "optimizer"),
    "zero2": ("none", "optimizer"),
    "zero3": ("none", "optimizer", "params+optimizer"),
}
PAIRS = [(layout, offload) for layout, offloads in LAYOUTS.items() for offload in offloads]


@given(
    pair=st.sampled_from(PAIRS),
    gpus=st.integers(1, 8),
    nodes=st.integers(1, 4),
    precision=st.sampled_from(("bf16-mixed", "fp16-mixed", "bf16")),
)
@settings(deadline=None, max_examples=60)
def test_accelerates_file_is_read_back(pair: tuple[str, str], gpus: int, nodes: int, precision: str) -> None:
    layout, offload = pair
    job = Job(model=MODEL, gpus=gpus, nodes=nodes, layout=layout, offload=offload, precision=precision)
    fields, remarks = _accelerate.read(_accelerate.config(job))
    assert remarks == []
    mixed = {"precision": precision} if precision.endswith("-mixed") else {}
    moved = {} if offload == "none" else {"offload": offload}
    assert fields == {"gpus": gpus, "nodes": nodes, "layout": layout, **moved, **mixed}


@pytest.mark.parametrize(("layout", "offload"), [pair for pair in PAIRS if pair[0].startswith("zero")])
def test_deepspeeds_file_is_read_back(layout: str, offload: str) -> None:
    fields, remarks = _deepspeed.read(json.loads(_deepspeed.text({"layout": layout, "offload": offload})))
    assert fields == {"layout": layout, **({} if offload == "none" else {"offload": offload})}
    assert [remark.what for remark in remarks] == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fsdp1.yaml", {"layout": "fsdp1", "gpus": 8, "nodes": 1}),
        ("zero3.yaml", {"layout": "zero3", "gpus": 8, "nodes": 1}),
        ("zero2.json", {"layout": "zero2", "offload": "optimizer", "gpus": 1}),
    ],
)
def test_files_given_together_are_one_job(name: str, said: dict[str, Any]) -> None:
    job = trainers.read_configs([BESIDE / name, SFT])
    assert {field: getattr(job, field) for field in said} == said
    assert job.model == "Qwen/Qwen2.5-0.5B"
    if job.offload is None:
        assert estimate(job).memory.peak_bytes < estimate(job.model_copy(update={"layout": "ddp"})).memory.peak_bytes
        return
    with pytest.raises(Unsupported):  # one line, until it is modelled
        estimate(job)


def test_three_files_are_one_job(tmp_path: Path) -> None:
    beside = yaml.safe_load((BESIDE / "zero3.yaml").read_text())
    beside["deepspeed_config"] = {"deepspeed_config_file": "ds_z3.json"}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(beside))
    job = trainers.read_configs([SFT, tmp_path / "accelerate.yaml"])
    assert job.layout == "zero3"
    assert (
        "by its name" in {remark.what: remark.why for remark in job.remarks}["deepspeed_config.deepspeed_config_file"]
    )
    both = trainers.read_configs([SFT, BESIDE / "zero2.json", tmp_path / "accelerate.yaml"])
    assert (both.layout, both.offload, both.gpus) == ("zero2", "optimizer", 8)
    assert POINTER not in {remark.what for remark in both.remarks}


def test_one_trainers_config_is_wanted() -> None:
    with pytest.raises(BadFile, match="give the trainer's config with it"):
        trainers.read_config(BESIDE / "fsdp1.yaml")
    with pytest.raises(BadFile, match="give one trainer's config with them"):
        trainers.read_configs([BESIDE / "fsdp1.yaml"])
    with pytest.raises(BadFile, match="not several"):
        trainers.read_configs(fixtures.of("trl")[:2])


def test_a_contradiction_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 3}')
    with pytest.raises(RequestError, match="micro_batch 3 contradicts the config's 8"):
        trainers.read_configs([SFT, tmp_path / "ds.json"])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"distributed_type": "TPU", "num_processes": 8}, "distributed_type: TPU is not read"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 3, "num_machines": 2}, "do not divide"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 4}}, "not a stage of ZeRO"),
    ],
)
def test_impossible_files_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        _accelerate.read(config)


@pytest.mark.parametrize(
    ("path", "layout"),
    [
        ("ds_z3_config.json", "zero3"),
        ("examples/deepspeed/ds_z2_offload_config.json", "zero2"),
        ("deepspeed_configs/zero1.json", "zero1"),
        ("zero3_bf16.json", "zero3"),
        ("ds_config.json", None),
        ("z0/config.json", None),
    ],
)
def test_a_file_not_given_is_guessed_from_its_name(path: str, layout: str | None) -> None:
    job = trainers.get("trl").read({"model_name_or_path": MODEL, "deepspeed": path}, name="x")
    assert job.layout == layout
    assert "second --config" in next(remark.why for remark in job.remarks if remark.what == "deepspeed")


def test_a_second_way_of_spreading_is_named() -> None:
    config = {"distributed_type": "MULTI_GPU", "num_processes": 4, "parallelism_config_tp_size": 2}
    _, remarks = _accelerate.read(config)
    assert [remark.what for remark in remarks] == ["parallelism_config_tp_size"]
