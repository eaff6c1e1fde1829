"""Methods of AdapterHub's `adapters`: estimates held to traces that were recorded in its own environment.

`adapters` pins another transformers than PEFT's traces run on, so its traces are kept in `traced/NAME.json`, with the
versions and the date. `python -m tests.oracles.hub NAME ...` records those of test_method_NAME.py's ROWS anew; tests
with the marker `trainers` do so too, and compare.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from peftplan.job import Job
from peftplan.pipeline import read
from tests.e2e.venvs import venv
from tests.oracles.equal import AGAIN, MIXED, PLAIN, WIDE, Row, predicted, tiny_job

HERE = Path(__file__).parent / "traced"
ROOT = Path(__file__).parents[2]
INSIDE = "tests.trainers.inside.for_adapters"
Numbers = dict[str, int]
Fields = dict[str, Any]


def job_of(row: Row) -> Job:
    """The job on a tiny model that a row stands for."""
    return tiny_job(*row)


def key(row: Row) -> str:
    """What a row is recorded under."""
    return f"{row[0]} {json.dumps(row[1], sort_keys=True)}"


def estimated(row: Row) -> Numbers:
    """The numbers that a trace counts, predicted."""
    return predicted(read(job_of(row)).estimate)


def union_rows(method: str, small: Fields, other: Fields, *, plain: Fields) -> list[Row]:
    """Jobs of a union of methods: its defaults in `plain`, then two choices of settings over precisions and models."""
    rows = (
        ("llama", plain),
        ("llama", {**PLAIN, "set": small}),
        ("llama", {**WIDE, "set": other}),
        ("llama", {**AGAIN, "set": small}),
        ("llama", {**MIXED, "set": small}),
        ("llama", {**MIXED, "dtype": "bf16", "set": other}),
        ("llama_biased", {**WIDE, "attention": "eager", "set": other}),
        ("mistral", {**WIDE, "set": {**small, "model.sliding_window": 9}}),
    )
    return [(family, {"method": method, **fields}) for family, fields in rows]


def recorded(name: str) -> dict[str, Numbers]:
    """The traces of a method's rows, by key."""
    rows: dict[str, Numbers] = json.loads((HERE / f"{name}.json").read_text("utf-8"))["rows"]
    return rows


def assert_as_recorded(name: str, row: Row) -> None:
    """The estimate is, number by number, what the trace recorded for the row says."""
    assert key(row) in recorded(name), f"not recorded; run python -m tests.oracles.hub {name}"
    assert estimated(row) == recorded(name)[key(row)]


def traced(rows: list[Row]) -> tuple[dict[str, Numbers], dict[str, str]]:
    """(numbers by key, versions) of traces made now, in the environment of `adapters`."""
    jobs = [job_of(row).model_dump(mode="json", by_alias=True) for row in rows]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(venv("adapters")), "-m", INSIDE], input=json.dumps(jobs), env=environment, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return {key(row): each["numbers"] for row, each in zip(rows, found, strict=True)}, found[0]["versions"]


def record(name: str) -> None:
    """Write a method's traces anew."""
    rows, versions = traced(importlib.import_module(f"tests.oracles.test_method_{name}").ROWS)
    page = {"date": date.today().isoformat(), "versions": versions, "rows": rows}
    (HERE / f"{name}.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        record(asked)
