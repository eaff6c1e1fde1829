"""Old against new: what differs between two revisions is found, named and measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import changes, changes_worker
from tests.changes import ROOT, Change, answers, compared, grid, text


def test_the_grid_is_wide_and_plain() -> None:
    jobs = grid()
    assert len(jobs) > 450
    assert {fields.get("method") for fields, _ in jobs.values()} > {"full", "lora", "qlora", "dora", "ia3"}
    assert json.loads(json.dumps(list(jobs.values()))) == [list(each) for each in jobs.values()]


def test_differences_are_found_and_the_largest_comes_first() -> None:
    before: list[dict[str, Any]] = [
        {"peak_bytes": 100, "flops": 7},
        {"peak_bytes": 100},
        {"error": "x"},
        {"peak_bytes": 5},
    ]
    after: list[dict[str, Any]] = [
        {"peak_bytes": 101, "flops": 7},
        {"peak_bytes": 80},
        {"peak_bytes": 1},
        {"peak_bytes": 5},
    ]
    found = compared(["a", "b", "c", "d"], before, after)
    assert found == [
        Change(job="c", quantity="error", before="x", after=None),
        Change(job="b", quantity="peak_bytes", before=100, after=80),
        Change(job="a", quantity="peak_bytes", before=100, after=101),
    ]
    said = text(found, 4, rows=2)
    assert said.splitlines()[0] == "4 jobs: 1 are answered as before, 3 differ in 3 quantities"
    assert said.splitlines()[2] == "b  peak_bytes  100 B  80 B  -20.000%"
    assert said.splitlines()[3] == "... and 1 more"
    assert "| a | peak_bytes | 100 B | 101 B | +1.000% |" in text(found, 4, rows=9, markdown=True)


def test_a_changed_coefficient_is_seen(tmp_path: Path) -> None:
    """The package copied, with one figure of it changed by a twentieth."""
    subprocess.run(["cp", "-r", str(ROOT / "peftplan"), str(tmp_path)], check=True)
    file = tmp_path / "peftplan" / "hardware" / "overheads.py"
    original = file.read_text()
    file.write_text(original.replace("bytes=32 * MIB", "bytes=int(32 * MIB * 1.05)"))
    assert file.read_text() != original
    job = {"model": "llama-3.2-1b", "method": "lora", "micro_batch": 1, "seq_len": 256, "gpu": "h100"}
    jobs = [(job, True), ({**job, "gpu": "a100"}, False)]
    found = compared(["h100", "a100"], answers(tmp_path, jobs), answers(ROOT, jobs))
    assert {change.job for change in found} == {"h100"}
    assert {"memory.peak_bytes", "memory.static_bytes"} <= {change.quantity for change in found}
    assert compared(["h100", "a100"], answers(ROOT, jobs), answers(ROOT, jobs)) == []


def test_what_cannot_be_answered_is_an_answer_too() -> None:
    refused = changes_worker.answer({"model": "no-such-model"}, changes_worker.QUANTITIES)
    assert refused["error"].startswith("UnknownName: ")
    known = changes_worker.answer({"model": "llama-7b"}, changes_worker.QUANTITIES)
    assert known["memory.peak_bytes"] > known["parameters.stored_bytes"] > 0
    assert known["time.step_seconds.expected"] is None


def test_an_unknown_revision_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert changes.main(["--base", "no-such-revision"]) == 2
    assert capsys.readouterr().err.startswith("error: no peftplan at revision 'no-such-revision'")
