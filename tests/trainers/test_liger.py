"""Liger's kernels in the configs of trainers that have them: read into a job, priced, and written back."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate, trainers
from peftplan.job import Job
from peftplan.trainers import Run
from peftplan.trainers.rules import Inexpressible, flatten

MODEL = "llama-7b"
PLUGIN = {"plugins": ["axolotl.integrations.liger.LigerPlugin"]}
SCRIPT = {"model": {"name": MODEL}, "method": "full"}
ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("trl", {"model_name_or_path": MODEL, "use_liger_kernel": True}, {"kernels.fused_linear_cross_entropy": False}),
    ("hf_script", {**SCRIPT, "arguments": {"use_liger_kernel": True}}, {}),
    (
        "hf_script",
        {**SCRIPT, "arguments": {"use_liger_kernel": True, "liger_kernel_config": {"rope": False}}},
        {"kernels.rope": False},
    ),
    ("llamafactory", {"model_name_or_path": MODEL, "enable_liger_kernel": True}, {}),
    ("llamafactory", {"model_name_or_path": MODEL, "use_liger_kernel": True}, {}),
    ("swift", {"model": MODEL, "use_liger_kernel": True}, {}),
    (
        "axolotl",
        {"base_model": MODEL, **PLUGIN, "liger_rope": True, "liger_swiglu": True},
        {
            "kernels.rope": True,
            "kernels.swiglu": True,
            "kernels.rms_norm": False,
            "kernels.cross_entropy": False,
            "kernels.fused_linear_cross_entropy": False,
        },
    ),
]


@pytest.mark.parametrize(("name", "config", "switches"), ROWS)
def test_a_config_that_asks_for_liger_is_priced_with_it(
    name: str, config: dict[str, Any], switches: dict[str, Any]
) -> None:
    job = trainers.get(name).read(config, name="x.yaml")
    assert job.kernels == "liger"
    assert {key: value for key, value in job.settings.items() if key.startswith("kernels.")} == switches
    assert not [remark for remark in job.remarks if "liger" in remark.what]
    plain = job.model_copy(
        update={"kernels": None, "settings": {k: v for k, v in job.settings.items() if "ker" not in k}}
    )
    assert estimate(job).memory.saved_for_backward_bytes < estimate(plain).memory.saved_for_backward_bytes


@pytest.mark.parametrize("name", ["hf_script", "llamafactory", "swift", "axolotl"])
def test_a_job_with_liger_is_written_and_read_back(name: str) -> None:
    written = flatten(trainers.get(name).config(Job(model=MODEL, kernels="liger"), Run()))
    assert any("liger" in key and value is True for key, value in written.items())
    again = trainers.get(name).read(trainers.get(name).config(Job(model=MODEL, kernels="liger"), Run()), name="x.yaml")
    assert again.kernels == "liger"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("trl", {"kernels": "liger"}),
        ("llamafactory", {"kernels": "liger", "set": {"kernels.rope": False}}),
        ("swift", {"kernels": "unsloth"}),
    ],
)
def test_what_a_trainer_has_no_word_for_is_said(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(Inexpressible, match="kernels="):
        trainers.get(name).config(Job(model=MODEL, **fields), Run())


def test_axolotl_without_the_plugin_leaves_the_keys_alone() -> None:
    job = trainers.get("axolotl").read({"base_model": MODEL, "liger_rope": True}, name="x.yaml")
    assert job.kernels is None
