"""The script: a literal that is read without being run, and every method of PEFT that peftplan has."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings

from peftplan import methods, trainers
from peftplan.errors import BadFile, RequestError, Unsupported
from peftplan.job import Job
from peftplan.trainers import Run
from peftplan.trainers.base import decided, fields_of, known_keys
from tests.trainers.spread import MODEL, jobs
from tests.trainers.trips import expressible, there_and_back

REFUSED = {"eva", "corda", "loftq"}
WRITTEN = sorted(method for method, able in trainers.support().items() if able["hf_script"])


@given(jobs())
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read_back(job: Job) -> None:
    if expressible("hf_script", job):
        there_and_back("hf_script", job)


@pytest.mark.parametrize("method", WRITTEN)
def test_every_method_is_written_and_read_back(method: str) -> None:
    job = trainers.example(method)
    there_and_back("hf_script", job)


def test_pefts_methods_are_written_and_no_others() -> None:
    own = {"full", "freeze", "bitfit", "galore", "apollo", "lomo", "adalomo"}
    pefts = {name for name in (*methods.names(), *methods.aliases()) if "PEFT" in methods.get(name).libraries}
    assert set(WRITTEN) - pefts == own
    assert pefts - set(WRITTEN) == REFUSED | {"cpt", "xlora"}


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_initialisations_that_need_data_are_refused(method: str) -> None:
    with pytest.raises(Unsupported, match=f"init_lora_weights={method}"):
        trainers.write_folder(Job(model=MODEL, method=method), trainer="hf_script", run=Run())


@pytest.mark.parametrize(
    "job",
    [
        Job(model=MODEL, method="pissa", format="nf4"),
        Job(model=MODEL, method="lora_fa", optimizer="adamw_8bit"),
        Job(model=MODEL, format="int8", gpus=2, layout="fsdp"),
        Job(model=MODEL, method="houlsby"),
    ],
    ids=["pissa-nf4", "lora_fa-8bit", "int8-fsdp", "adapterhub"],
)
def test_pairs_that_cannot_train_are_refused(job: Job) -> None:
    with pytest.raises(Unsupported):
        trainers.write_folder(job, trainer="hf_script", run=Run())


@given(jobs())
@settings(max_examples=50, deadline=None)
def test_only_arguments_of_the_pinned_version_are_written(job: Job) -> None:
    if expressible("hf_script", job):
        arguments = trainers.get("hf_script").config(job, Run())["arguments"]
        assert {f"arguments.{key}" for key in arguments} <= known_keys("hf_script")


def test_the_script_is_read_without_being_run(tmp_path: Path) -> None:
    job = Job(model=MODEL, method="dora", rank=4, set={"method.rank_pattern": {"model.layers.0.q_proj": 2}})
    text = trainers.write_folder(job, trainer="hf_script", run=Run()).files["train.py"]
    path = tmp_path / "train.py"
    path.write_text(f"{text}\nraise SystemExit('this ran')\n")
    back = trainers.read_config(path)
    assert back.trainer == "hf_script"
    assert back.settings["method.rank_pattern"] == {"model.layers.0.q_proj": 2}
    said = fields_of(decided(job))
    assert {key: fields_of(decided(back)).get(key) for key in said} == said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import os", "no `CONFIG = {...}` in it"),
        ("CONFIG = dict(a=1)", "not a plain literal"),
        ("CONFIG = {'a': __import__('os').getcwd()}", "not a plain literal"),
        ("CONFIG = {", "not a plain literal"),
        ("CONFIG = [1]", "no `CONFIG"),
    ],
)
def test_other_scripts_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "train.py"
    path.write_text(text)
    with pytest.raises(BadFile, match=says):
        trainers.read_config(path)


def test_unknown_arguments_are_named() -> None:
    config = trainers.get("hf_script").config(Job(model=MODEL), Run())
    config["arguments"]["gradient_chekpointing"] = True
    job = trainers.get("hf_script").read(config, name="train.py")
    said = {remark.what: remark.why for remark in job.remarks}
    assert "did you mean arguments.gradient_checkpointing?" in said["arguments.gradient_chekpointing"]
    with pytest.raises(RequestError, match="method: 'lor' is not one of"):
        trainers.get("hf_script").read({**config, "method": "lor"}, name="train.py")


def test_the_script_is_python_with_one_literal() -> None:
    text = trainers.write_folder(Job(model=MODEL, method="qlora"), trainer="hf_script", run=Run()).files["train.py"]
    assigned = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    assert len(assigned) == 1
    assert ast.literal_eval(assigned[0].value)["quantization"]["bnb_4bit_compute_dtype"] == "float16"
    assert all(len(line) <= 120 for line in text.splitlines())
