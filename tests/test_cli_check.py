"""`peftplan check`, `compare` and `accuracy` as typed: outputs, exit codes, one line per mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftplan.cli import accuracy, main
from tests.test_cli_process import ROOT, WATCHED

JOB = "model: llama-7b\nmethod: qlora\nmicro_batch: 1\nseq_len: 128\n"
RECORDS = ROOT / "profiles" / "published"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)
    Path("sft.yaml").write_text("model_name_or_path: llama-7b\nuse_peft: true\nmax_length: 4096\n")
    return tmp_path


def _run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(line.split())
    return (code, *capsys.readouterr())


def test_within_and_over_are_0_and_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("check job.yaml --max-memory 24GB", capsys)[0] == 0
    code, out, err = _run("check job.yaml sft.yaml --gpu rtx-4090 --max-memory 24GB", capsys)
    assert (code, err) == (1, "")
    assert "sft.yaml:3 max_length: 4096" in out
    assert out.index("sft.yaml") < out.index("job.yaml")


def test_what_cannot_be_judged_is_2_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run("check gone.yaml job.yaml --max-memory 24GB --json", capsys)
    assert (code, err) == (2, "error: gone.yaml: No such file or directory\n")
    assert [result["status"] for result in json.loads(out)["results"]] == ["error", "within"]
    assert "2 configurations could not be judged; the first: a.yaml" in _run("check a.yaml b.yaml --gpu t4", capsys)[2]


def test_check_as_json_and_as_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run("check sft.yaml --max-memory 24GB --json", capsys)
    answer = json.loads(out)
    assert (code, answer["schema"], answer["status"]) == (1, "peftplan.check/1", "over")
    assert answer["results"][0]["levers"][0]["line"] == 3
    code, out, _ = _run("check sft.yaml job.yaml --max-memory 24GB --markdown", capsys)
    rows = out.splitlines()
    assert rows[0] == "**peftplan: 1 within budget, 1 over**"
    assert rows[4].startswith("| OVER | `sft.yaml` | ")
    assert "sft.yaml:3 max_length: 4096" in rows[4]
    assert all(row.count(" | ") == 3 for row in rows[4:])


def test_keys_that_are_not_priced_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sft.yaml").write_text("model_name_or_path: llama-7b\nuse_peft: true\nfrobnicate: true\n")
    shown = " ".join(_run("check sft.yaml --max-memory 1TB", capsys)[1].split())
    assert "not priced as written, could move memory: frobnicate" in shown


WRONG = {
    "check": "no budgets: no peftplan.toml",
    "check --max-memory 24GB": "limits need a configuration",
    "check job.yaml --max-memory 24cows": "--max-memory: cannot read '24cows' as a size",
    "check job.yaml --max-memory -24GB": "--max-memory: cannot read '-24GB'",
    "check job.yaml --max-memory 24": "--max-memory: 24 has no unit",
    "check job.yaml --max-usd -1": "--max-usd: input should be greater than or equal to 0",
    "check job.yaml --max-growth 5": "--max-growth: '5' says neither bytes nor percent",
    "check job.yaml --gpu h1000": "--gpu: unknown GPU 'h1000'; did you mean h100",
    "check job.yaml --max-memry 3": "no such option --max-memry; did you mean --max-memory?",
    "check job.yaml --max-growth 5% --base HEAD": "job.yaml: not in a git repository",
    "check --budgets gone.toml": "gone.toml: No such file",
    "compare": "name two files to compare",
    "compare job.yaml": "one job alone cannot be compared",
    "compare job.yaml gone.yaml": "gone.yaml: No such file",
    "compare job.yaml --base HEAD": "not in a git repository",
    "accuracy gone": "gone is not a folder of records",
    "accuracy .": ". holds no records",
    f"accuracy {RECORDS} --by gpus": "unknown --by 'gpus'; did you mean gpu",
    f"accuracy {RECORDS} --explain fitcheck-edge": "unknown record 'fitcheck-edge'; did you mean",
    f"accuracy {RECORDS} --match fitcheck-edge --plot errors.doc": "--plot errors.doc: give a name ending in .svg",
    "accuracy --kind devise": "unknown --kind 'devise'; did you mean device",
    f"accuracy {RECORDS} --match nothing-has-this": "match --match",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_is_one_line_and_exit_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(line, capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert WRONG[line] in err


def test_compare_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run("compare job.yaml sft.yaml --seq-len 256 --gpu h100", capsys)
    assert (code, err) == (0, "")
    assert "seq_len" not in out
    assert "on the card" in out
    code, out, _ = _run("compare job.yaml --method dora --json", capsys)
    answer = json.loads(out)
    assert (code, answer["schema"], answer["names"]) == (0, "peftplan.compare/1", ["job.yaml", "--method dora"])
    assert "method" in [choice["field"] for choice in answer["question"]]


def test_compare_takes_files_by_option_too(capsys: pytest.CaptureFixture[str]) -> None:
    answer = json.loads(_run("compare job.yaml --config sft.yaml --json", capsys)[1])
    assert answer["names"] == ["job.yaml", "sft.yaml"]


def test_equal_jobs_are_said_to_be_equal(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run("compare job.yaml job.yaml", capsys)
    assert code == 0
    assert "nothing: the jobs ask the same" in out


def test_accuracy_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(f"accuracy {RECORDS} --match fitcheck-edge --by gpu", capsys)
    assert code == 0
    assert "| NVIDIA Tesla T4 16GB (14,912 MiB) | 6 | 6 |" in out
    answer = json.loads(_run(f"accuracy {RECORDS} --match fitcheck-edge --by kind --json", capsys)[1])
    assert answer["groups"]["device"]["judged"] == 6


def test_a_record_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    name = "fitcheck-09-15-SmolLM2-135M-flash-none-b2-s512-r32"
    code, out, _ = _run(f"accuracy {RECORDS} --explain {name}", capsys)
    assert code == 0
    assert all(said in out for said in ("torch 2.14", "allocated_peak", "Where the bytes come from", "= the peak"))
    answer = json.loads(_run(f"accuracy {RECORDS} --explain {name} --json", capsys)[1])
    allocated = next(v for v in answer["values"] if v["kind"] == "allocated_peak")
    assert sum(term["bytes"] for term in answer["terms"]) == allocated["predicted_bytes"]


def test_errors_are_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "errors.svg"
    assert _run(f"accuracy {RECORDS} --match fitcheck-edge --plot {target}", capsys)[0] == 0
    assert "<svg" in target.read_text(encoding="utf-8")


def test_accuracy_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(f"accuracy {RECORDS} --match fitcheck-edge --judged", capsys)
    assert code == 0
    assert "values judged: median absolute error" in out
    answer = json.loads(_run(f"accuracy {RECORDS} --match fitcheck-edge --kind device --json", capsys)[1])
    assert answer["schema"] == "peftplan.accuracy/1"
    assert answer["summary"]["rows"] == len(answer["rows"])
    for row in answer["rows"]:
        assert row["kind"] == "device"
        assert row["error"] == pytest.approx(row["predicted_bytes"] / row["measured_bytes"] - 1)


def test_an_installed_package_without_records_says_what_to_give(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "__file__", str(folder / "lib" / "peftplan" / "cli" / "accuracy.py"))
    code, _, err = _run("accuracy", capsys)
    assert code == 2
    assert "give the folder" in err


def test_lines_that_are_no_records_are_counted_not_flooded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = next(RECORDS.rglob("*.jsonl")).read_text().splitlines()[0]
    (folder / "records.jsonl").write_text("\n".join([good, *["{}"] * 9]))
    out = _run("accuracy .", capsys)[1]
    assert out.count("problem: ") == 6
    assert "problem: 4 more lines" in out


@pytest.mark.parametrize("line", ["check job.yaml sft.yaml --max-memory 1TB", "compare job.yaml --method lora"])
def test_no_torch_and_no_network_in_the_process(line: str) -> None:
    watched = [sys.executable, "-c", WATCHED, *line.split()]
    done = subprocess.run(
        watched, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    code, *modules = done.stderr.split()
    assert code == "0"
    assert not {"torch", "transformers", "peft", "huggingface_hub", "numpy"}.intersection(modules)
