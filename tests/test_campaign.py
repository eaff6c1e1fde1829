"""A campaign: its file, and runs that go on where they were cut off, survive running out of memory and bad records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from peftplan.accuracy import compare
from peftplan.errors import BadFile, OutsideError, PeftplanError, RequestError
from peftplan.instruments import build, campaign_run
from peftplan.instruments.campaign import Campaign, parse_seconds, read
from peftplan.instruments.campaign_run import Outcome, Report, run
from peftplan.pipeline import estimate
from peftplan.records import Record, load
from peftplan.units import GIB

pytestmark = pytest.mark.trace
CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 88, "vocab_size": 97, "max_position_embeddings": 4096,
    "pad_token_id": 0,
}  # fmt: skip
FILE: dict[str, Any] = {
    "schema": "peftplan.campaign/1",
    "name": "tiny",
    "warm_up": 2,
    "timed": 1,
    "base": {"model": "tiny", "config": CONFIG, "micro_batch": 2, "seq_len": 16, "set": {"model.use_cache": False}},
    "runs": [
        {"name": "seq", "vary": {"seq_len": [8, 16]}},
        {"name": "rank", "job": {"rank": 4, "set": {"method.lora_dropout": 0.1}}},
    ],
}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "campaign.yaml"
    path.write_text(json.dumps({**FILE, **changes}))
    return path


def campaign(tmp_path: Path, **changes: Any) -> Campaign:
    return read(written(tmp_path, **changes), device="cpu")


class Watch:
    """Notes what it is told; interrupts when run `until` begins."""

    def __init__(self, until: int | None = None) -> None:
        self.until = until
        self.ended: list[str] = []

    def begins(self, name: str, number: int, total: int) -> None:  # noqa: ARG002 - all are told
        if number == self.until:
            raise KeyboardInterrupt

    def ends(self, outcome: Outcome) -> None:
        self.ended.append(f"{outcome.name}: {outcome.status}")


def statuses(report: Report) -> list[str]:
    return [outcome.status for outcome in report.outcomes]


# -- the file ------------------------------------------------------------------------------------------------------


def test_lists_become_runs_and_settings_are_laid_over_the_base(tmp_path: Path) -> None:
    found = campaign(
        tmp_path, runs=[*FILE["runs"], {"name": "x", "vary": {"method": ["lora", "full"], "loop.ema": ["none"]}}]
    )
    assert [planned.name for planned in found.runs] == ["seq-8", "seq-16", "rank", "x-lora-none", "x-full-none"]
    assert found.runs[0].job.seq_len == 8
    assert found.runs[2].job.settings == {"model.use_cache": False, "method.lora_dropout": 0.1}
    assert found.runs[4].job.settings == {"model.use_cache": False, "loop.ema": "none"}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "other schema": ({"schema": "peftplan.campaign/2"}, "'peftplan.campaign/2' is not peftplan.campaign/1"),
    "no runs": ({"runs": []}, "runs: list should have at least 1 item"),
    "unknown key": ({"jobs": []}, "jobs: extra inputs are not permitted"),
    "same name twice": ({"runs": [{"name": "a"}, {"name": "a"}]}, "two runs are called 'a'"),
    "bad name": ({"runs": [{"name": "../a"}]}, "a name has letters"),
    "unknown field": ({"runs": [{"name": "a", "job": {"micro_bach": 1}}]}, "run a: unknown job field 'micro_bach'"),
    "bad limit": ({"runs": [{"name": "a", "limit": "much"}]}, "run a: cannot read 'much' as a size"),
    "too many": ({"runs": [{"name": "a", "vary": {"seq_len": list(range(1, 502))}}]}, "more than 500 runs"),
    "no time": ({"budget": "soon"}, "cannot read 'soon' as a time"),
    "no warm-up": ({"warm_up": 0}, "a steady step needs one before it"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line(tmp_path: Path, case: str) -> None:
    changes, says = BAD[case]
    with pytest.raises(RequestError) as caught:
        campaign(tmp_path, **changes)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("7", 7)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


# -- with stand-ins for the processes ------------------------------------------------------------------------------


class FakeWorker:
    """Answers as a worker would, at once; `answers` overrules by the name of the run."""

    asked: list[str]
    answers: dict[str, Any]
    alive = 0

    def __init__(self) -> None:
        type(self).alive += 1

    def ask(self, line: str, seconds: float) -> dict[str, Any]:
        assert seconds > 0
        asked = json.loads(line)
        self.asked.append(asked["identity"])
        name = asked["identity"].removeprefix("tiny-cpu-")
        return self.answers.get(name) or {"record": _record(asked)}

    def end(self) -> None:
        type(self).alive -= 1


def _record(asked: dict[str, Any], **changes: Any) -> dict[str, Any]:
    from peftplan.instruments.request import Settings, fingerprint
    from peftplan.job import make_job

    print_of = fingerprint(make_job(**asked["job"]), Settings(**asked["settings"]))
    record = Record.model_validate(
        {
            "id": asked["identity"], "kind": "traced", "source": "test", "source_rev": "1", "date": "2026-11-21",
            "campaign": asked["campaign"], "gpu": "none", "job": asked["job"], "setup_known": "full",
            "measured": [{"kind": "allocated_peak", "bytes": 1000}], "run": {"asked": print_of, "warm_up_steps": 1},
            **changes,
        }
    )  # fmt: skip
    answer: dict[str, Any] = json.loads(record.to_line())
    return answer


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    class Fresh(FakeWorker):
        asked: list[str] = []  # noqa: RUF012 - of one test
        answers: dict[str, Any] = {}  # noqa: RUF012 - of one test
        alive = 0

    monkeypatch.setattr(campaign_run, "_Worker", Fresh)
    return Fresh


def test_what_was_interrupted_goes_on_where_it_was(tmp_path: Path, worker: type[FakeWorker]) -> None:
    planned, out = campaign(tmp_path), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(planned, out, device="cpu", watcher=Watch(until=2))
    assert [record.id for record in load(out)] == ["tiny-cpu-seq-8"]
    report = run(planned, out, device="cpu", watcher=Watch())
    assert statuses(report) == ["recorded already", "measured", "measured"]
    assert worker.asked == ["tiny-cpu-seq-8", "tiny-cpu-seq-16", "tiny-cpu-rank"]
    assert worker.alive == 0
    assert [path.name for path in out.iterdir()] == ["tiny-cpu.jsonl"]


def test_a_changed_job_is_measured_again_in_place_of_its_record(tmp_path: Path, worker: type[FakeWorker]) -> None:
    out = tmp_path / "out"
    run(campaign(tmp_path), out, device="cpu", watcher=Watch())
    changed = campaign(tmp_path, runs=[FILE["runs"][0], {"name": "rank", "job": {"rank": 5}}])
    assert statuses(run(changed, out, device="cpu", watcher=Watch())) == [*["recorded already"] * 2, "measured"]
    assert [record.job.get("rank") for record in load(out)] == [None, None, 5]
    assert len(worker.asked) == 4


def test_running_out_of_memory_is_a_result_and_the_rest_goes_on(tmp_path: Path, worker: type[FakeWorker]) -> None:
    planned, out = campaign(tmp_path), tmp_path / "out"
    asked = json.loads(_line(planned, 1))
    worker.answers["seq-16"] = {"record": _record(asked, out_of_memory=True, measured=[])}
    report = run(planned, out, device="cpu", watcher=Watch())
    assert statuses(report) == ["measured", "out of memory", "measured"]
    assert report.exit_code == 0
    assert [record.out_of_memory for record in load(out)] == [False, True, False]
    assert statuses(run(planned, out, device="cpu", watcher=Watch())) == ["recorded already"] * 3


def _line(planned: Campaign, index: int) -> str:
    from peftplan.instruments import request

    wanted = planned.runs[index]
    return request.line(wanted.job, wanted.settings, identity=f"tiny-cpu-{wanted.name}", campaign="tiny-cpu")


def test_a_failure_is_named_and_tried_again_next_time(tmp_path: Path, worker: type[FakeWorker]) -> None:
    planned, out = campaign(tmp_path), tmp_path / "out"
    worker.answers["seq-8"] = {"error": "the real model fails", "exit_code": 3}
    report = run(planned, out, device="cpu", watcher=Watch())
    assert statuses(report) == ["failed", "measured", "measured"]
    assert (report.exit_code, report.outcomes[0].error) == (3, "the real model fails")
    worker.answers.clear()
    assert statuses(run(planned, out, device="cpu", watcher=Watch()))[0] == "measured"


def test_without_the_device_nothing_else_is_tried(tmp_path: Path, worker: type[FakeWorker]) -> None:
    worker.answers["seq-8"] = {"error": "no GPU here", "exit_code": 3, "no_device": True}
    with pytest.raises(OutsideError, match="no GPU here"):
        run(campaign(tmp_path), tmp_path / "out", device="cpu", watcher=Watch())
    assert worker.asked == ["tiny-cpu-seq-8"]
    assert worker.alive == 0


def test_the_budget_leaves_out_what_would_not_end_in_time(tmp_path: Path, worker: type[FakeWorker]) -> None:
    worker.answers["seq-8"] = {"late": True}
    watch = Watch()
    report = run(campaign(tmp_path), tmp_path / "out", device="cpu", budget_seconds=1e-6, watcher=watch)
    assert statuses(report) == ["not reached"] * 3
    assert watch.ended == ["seq-8: not reached", "seq-16: not reached", "rank: not reached"]
    assert not (tmp_path / "out").exists()


def test_a_record_that_was_cut_off_is_kept_aside_and_measured_again(tmp_path: Path, worker: type[FakeWorker]) -> None:
    planned, out = campaign(tmp_path), tmp_path / "out"
    run(planned, out, device="cpu", watcher=Watch())
    path = out / "tiny-cpu.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], lines[1][:90], lines[2], lines[2]]))
    report = run(planned, out, device="cpu", watcher=Watch())
    assert statuses(report) == ["recorded already", "measured", "recorded already"]
    assert [problem.split("/")[-1].split(" ")[0] for problem in report.problems] == [
        "tiny-cpu.jsonl:2:",
        "tiny-cpu.jsonl:4:",
    ]
    assert sorted(record.id for record in load(out)) == ["tiny-cpu-rank", "tiny-cpu-seq-16", "tiny-cpu-seq-8"]
    assert load(out).problems == ()
    assert (out / "tiny-cpu.jsonl.rejected").read_bytes().splitlines() == [lines[1][:90], lines[2]]
    assert worker.asked[-1] == "tiny-cpu-seq-16"


@pytest.mark.usefixtures("worker")
def test_a_run_that_cannot_be_estimated_is_said_before_any_is_measured(tmp_path: Path) -> None:
    wrong = campaign(tmp_path, runs=[{"name": "a"}, {"name": "b", "job": {"method": "full", "rank": 4}}])
    with pytest.raises(RequestError, match="run b: --rank means nothing"):
        run(wrong, tmp_path / "out", device="cpu", watcher=Watch())
    assert not (tmp_path / "out").exists()


# -- for real --------------------------------------------------------------------------------------------------------


def test_processes_of_their_own_measure_and_run_out_of_memory(tmp_path: Path) -> None:
    """The second run may map 300 MB more than its libraries and needs gigabytes."""
    large = {"name": "large", "job": {"micro_batch": 64, "seq_len": 4096}, "limit": "300MB"}
    planned = campaign(tmp_path, runs=[{"name": "lora"}, large])
    report = run(planned, tmp_path / "out", device="cpu", watcher=Watch())
    assert statuses(report) == ["measured", "out of memory"], [outcome.error for outcome in report.outcomes]
    measured, failed = load(tmp_path / "out")
    (row,) = compare([measured], estimate)
    assert (row.kind, row.predicted_bytes) == ("allocated_peak", row.measured_bytes)
    assert (failed.measured, failed.gpu) == ((), "none (CPU)")
    assert failed.run is not None
    assert (failed.run.limit_bytes, failed.run.failed_in) == (300_000_000, "forward")


def test_the_module_needs_a_gpu_for_cuda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert campaign_run.main([str(written(tmp_path)), "--out", str(tmp_path / "out")]) == 3
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --device cuda: torch sees no GPU")


def test_the_module_reads_its_file_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert campaign_run.main([str(tmp_path / "nowhere.yaml"), "--out", str(tmp_path)]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    assert issubclass(BadFile, PeftplanError)


# -- the campaigns that are there -------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "profiles" / "campaigns").glob("*.yaml"))
CARD_BYTES = 78 * GIB
"""Of an H100 with 80 GB, the smallest card they are for."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_committed_campaign_runs_on_one_large_card(path: Path) -> None:
    """Every job is one that the instrument builds, fits, and is quick; those under a limit lie on both sides of it."""
    found = read(path, device="cuda")
    assert found.budget_seconds is not None
    assert found.budget_seconds < 600
    answers = [(planned, estimate(planned.job)) for planned in found.runs]
    for planned, answer in answers:
        build.decide(answer.job, build.CUDA_ATTENTION)
        assert answer.memory.peak_bytes < CARD_BYTES, planned.name
    limits = {planned.settings.limit_bytes for planned, _ in answers}
    for size in (size for size in limits if size is not None):
        fits = {answer.memory.peak_bytes < size for planned, answer in answers if planned.settings.limit_bytes == size}
        assert fits == {True, False}


def test_measuring_needs_neither_typer_nor_rich_nor_torch_in_the_parent() -> None:
    names = ("typer", "rich", "torch", "peft", "transformers")
    blocked = f"import sys; sys.modules.update(dict.fromkeys({names!r}))"
    code = f"{blocked}; from peftplan.instruments import campaign_run, cuda, history; campaign_run.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--budget" in done.stdout


def test_a_campaign_is_documented_as_it_is_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8")
    path = tmp_path / "campaign.yaml"
    path.write_text(page.partition("```yaml campaign.yaml\n")[2].partition("```")[0])
    assert len(read(path, device="cuda").runs) == 7
