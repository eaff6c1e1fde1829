"""Options and job files become the Job they say, or one line that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from peftplan import datafile
from peftplan.cli import jobfile
from peftplan.cli.options import FILE_FIELDS, JobOptions
from peftplan.errors import PeftplanError
from peftplan.job import Job
from tests import sample


def test_every_field_of_a_job_has_an_option_or_comes_from_a_file_only() -> None:
    options = set(get_type_hints(JobOptions)) - {*FILE_FIELDS, "assignments"}
    assert set(Job.model_fields) - options == {"settings", "config", "trainer", "extras", "remarks"}


def test_options_reach_the_job_typed() -> None:
    job = JobOptions(
        model="llama-7b",
        rank="16",
        target_modules="q_proj, v_proj",
        usd_per_hour="0.5",
        assignments=["method.lora_dropout=0.1", "model.use_cache=false", "method.layers=[0, 1]"],
    ).job()
    assert (job.rank, job.target_modules, job.usd_per_hour) == (16, ("q_proj", "v_proj"), 0.5)
    assert job.settings == {"method.lora_dropout": 0.1, "model.use_cache": False, "method.layers": [0, 1]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("0.1", 0.1),
        ("7", 7),
        ("-1", -1),
        ("017", 17),
        ("true", True),
        ("False", False),
        ("null", None),
        ("None", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2026-11-21", "2026-11-21"),
        ("'7'", "7"),
        ("", None),
        ("a=b", "a=b"),
        ("[q_proj, 2, 0.5]", ["q_proj", 2, 0.5]),
    ],
)
def test_values_are_read_as_people_mean_them(text: str, value: Any) -> None:
    (read,) = jobfile.assignments([f"method.knob={text}"]).values()
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("lora_dropout=0.1", "write it like method.lora_dropout=0.1"),
        ("method.lora_dropout", "write it like"),
        ("method.=1", "write it like"),
        ("metod.lora_dropout=1", "unknown --set prefix 'metod'; did you mean method"),
        ("method.x={a: 1}", "a value is a number, a word"),
        ("method.x=[1", "cannot read the value"),
        ("method.x=!!python/object/apply:os.system [id]", "cannot read the value"),
        ("method.x=&a [*a]", "anchors and aliases are not read"),
    ],
)
def test_a_wrong_assignment_is_named(pair: str, says: str) -> None:
    with pytest.raises(PeftplanError) as caught:
        jobfile.assignments([pair])
    assert says in str(caught.value)


def _file(tmp_path: Path, text: str, name: str = "job.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_yaml_job_and_options_over_it(tmp_path: Path) -> None:
    path = _file(tmp_path, "model: llama-7b\nmicro_batch: 4\nset:\n  method.lora_dropout: 0.1\n")
    job = JobOptions(job_file=path, micro_batch="2", assignments=["method.bias=all"]).job()
    assert (job.model, job.micro_batch) == ("llama-7b", 2)
    assert job.settings == {"method.lora_dropout": 0.1, "method.bias": "all"}


def test_an_estimates_json_gives_back_its_job(tmp_path: Path) -> None:
    answer = sample.estimate(job=sample.job(set={"model.use_cache": False}))
    path = _file(tmp_path, answer.to_json(), "answer.json")
    assert JobOptions(job_file=path).job() == answer.job


def test_a_job_dumped_by_python_is_read_back(tmp_path: Path) -> None:
    job = sample.job(target_modules=("q_proj", "v_proj"), set={"method.bias": "all"})
    path = _file(tmp_path, job.model_dump_json(by_alias=True), "job.json")
    assert JobOptions(job_file=path).job() == job


def test_a_replaced_choice_takes_its_knobs_with_it(tmp_path: Path) -> None:
    stated = {"model": "a", "config": {"x": 1}, "set": {"model.x": 1, "method.bias": "all"}}
    path = _file(tmp_path, json.dumps(stated), "job.json")
    job = JobOptions(job_file=path, model="b").job()
    assert (job.model, job.config, job.settings) == ("b", None, {"method.bias": "all"})
    same = JobOptions(job_file=path, model="a").job()
    assert (same.config, same.settings) == ({"x": 1}, stated["set"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a mapping of job fields, found nothing"),
        ("- a\n- b\n", "found a list"),
        ("model: a\nmodel: b\n", "line 2: 'model' twice"),
        ("model: a\nmicro_bach: 2\n", "unknown job field 'micro_bach'; did you mean micro_batch"),
        ("model: a\nmicro_batch: 0\n", "--micro-batch"),
        ("model: !!python/name:os.system\n", "tags are not read"),
        ("seq_len: !!timestamp 2026-01-01\n", "tags are not read"),
        ("a: &a [1]\nb: *a\n", "anchors and aliases are not read"),
        ("model: a\nset: 3\n", "`set` must be a mapping"),
        ("model: a\nset:\n  nowhere.x: 3\n", "unknown prefix"),
        ("3: 4\n", "the field name 3 is not text"),
        ("{model: [}", "job.yaml"),
        ('{"model": "a", "usd_per_hour": NaN}', "NaN is not a number"),
        ('{"schema": "peftplan.list/1", "items": []}', "holds no job"),
        ("[" * 5000, "nested too deeply"),
        ('{"model": ' + "[" * 100_000, "nested too deeply"),
        ("model: a\n# " + "x" * (datafile.MAX_YAML_BYTES + 1), "write it as JSON"),
        (" " * (datafile.MAX_JSON_BYTES + 1), "larger than 16 MiB"),
        ("format: nf4\n", "--model is missing"),
    ],
)
def test_a_bad_job_file_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(PeftplanError) as caught:
        JobOptions(job_file=_file(tmp_path, text)).job()
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_unreadable_job_files_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "job.bin"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    for path, says in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "directory"), (binary, "UTF-8")):
        with pytest.raises(PeftplanError, match=says):
            JobOptions(job_file=path).job()


def test_a_trainers_config_and_accelerates_beside_it_are_one_job(tmp_path: Path) -> None:
    sft, accelerate = tmp_path / "sft.yaml", tmp_path / "accelerate.yaml"
    sft.write_text("model_name_or_path: llama-7b\nuse_peft: true\nlora_r: 4\nper_device_train_batch_size: 2\n")
    accelerate.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nnum_machines: 1\nmixed_precision: bf16\n")
    job = JobOptions(config_file=[sft, accelerate], seq_len="64").job()
    assert (job.trainer, job.rank, job.micro_batch, job.seq_len, job.gpus, job.layout) == ("trl", 4, 2, 64, 2, "ddp")
    with pytest.raises(PeftplanError, match="give one of them"):
        JobOptions(config_file=[sft], job_file=sft).job()
