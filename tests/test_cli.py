"""The process that users meet: exit codes, streams, one-line errors. The model behind it is a fake here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peftplan.breakdown import Saving
from peftplan.cli import main
from peftplan.errors import OutsideError, RequestError
from peftplan.job import Job
from peftplan.report import cards
from tests import sample


class FakeModel(ModuleType):
    """Stands in for `peftplan.pipeline` and `peftplan.breakdown`: the sample's numbers, or an error."""

    Saving = Saving

    def __init__(self) -> None:
        super().__init__("peftplan.pipeline")
        self.failure: BaseException | None = None

    def estimate(self, job: Job) -> Any:
        if self.failure is not None:
            raise self.failure
        return sample.estimate(job=job)

    def explain(self, job: Job) -> Any:  # noqa: ARG002 - any job
        return sample.terms()

    def savings(self, job: Job, answer: Any) -> Any:  # noqa: ARG002 - any job
        return sample.savings()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setitem(sys.modules, "peftplan.pipeline", fake)
    monkeypatch.setitem(sys.modules, "peftplan.breakdown", fake)
    monkeypatch.setattr(cards, "common", lambda: sample.CARDS)
    return fake


def _line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; nothing else was printed anywhere."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("command", ["estimate", "explain"])
def test_json_is_one_object_and_nothing_else(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--model", "llama-7b", "--gpu", "×", "--json"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (answer["schema"], answer["job"]["gpu"], err) == (f"peftplan.{command}/1", "×", "")
    assert out.isascii()


@pytest.mark.usefixtures("model")
def test_explain_json_holds_terms_and_savings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", "llama-7b", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert sum(term["bytes"] for term in answer["terms"]) == answer["memory"]["peak_bytes"]
    assert answer["savings"][0]["job"]["recompute"] == "full"


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("command", ["estimate", "explain"])
def test_reports_are_plain_text_in_a_pipe(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--model", "llama-7b"]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out
    assert "What would lower the peak most" in out
    assert err == ""


WRONG = {
    "estimate": "--model is missing",
    "estimate --modle x": "no such option --modle; did you mean --model?",
    "estimate --model": "option '--model' requires an argument",
    "estimate --model x --rank": "requires an argument",
    "estimate --model x --micro-batch abc": "--micro-batch: give a whole number, not 'abc'",
    "estimate --model x --micro-batch 0": "--micro-batch: give 1 or more, not '0'",
    "estimate --model x --seq-len -5": "--seq-len: give 1 or more, not '-5'",
    "estimate --model x --rank 1.5": "--rank",
    "estimate --model x --gpus 0": "--gpus",
    "estimate --model x --usd-per-hour -1": "--usd-per-hour",
    "estimate --model x --batching bucketed": "--batching: give 'padded', 'packed' or 'exact'",
    "estimate --model x --task fly": "--task",
    "estimate --model x --set metod.rank=1": "unknown --set prefix 'metod'; did you mean method",
    "estimate --job nowhere.yaml": "nowhere.yaml: No such file",
    "estimate x": "unexpected extra argument",
    "estimat --model x": "did you mean 'estimate'?",
    "estimate --model x --set method.": "write it like method.lora_dropout=0.1",
    "list": "missing argument 'what'",
    "list modells": "did you mean models",
    "profile --model x --device tpu": "unknown --device 'tpu'",
}


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_is_one_line_and_exit_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert WRONG[line].lower() in _line(capsys).lower()


UNFIT = {
    "--method full --rank 8": "--rank means nothing to method full; leave it out",
    "--method full --set method.x=1": "method full has no settings; leave x out",
    "--rank 8 --set method.r=4": "--rank 8 contradicts method.r=4; give one of them",
    "--format gptqq": "unknown format 'gptqq'; did you mean gptq, hqq?",
    "--set loop.outputs_until=never": "unknown loop.outputs_until 'never'",
}


@pytest.mark.parametrize("options", UNFIT)
def test_choices_that_do_not_go_together_are_one_line(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--model", "llama-7b", *options.split()]) == 2
    assert UNFIT[options] in _line(capsys)


def test_a_list_in_a_pipe_has_one_line_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["list", "models"]) == 0
    heads = [row.split()[0] for row in capsys.readouterr().out.splitlines() if row]
    assert main(["list", "models", "--json"]) == 0
    assert len(heads) == len(json.loads(capsys.readouterr().out)["items"]) + 2  # the heading and the count


@pytest.mark.parametrize(("error", "code"), [(RequestError("no\n such"), 2), (OutsideError("no such"), 3)])
def test_the_models_own_errors_keep_their_code(
    model: FakeModel, error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model.failure = error
    assert main(["estimate", "--model", "x", "--json"]) == code
    assert _line(capsys) == "error: no such\n"


def test_control_characters_and_endless_names_stay_out_of_the_terminal(
    model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    model.failure = RequestError("unknown \x1b[2J" + "x" * 100_000)
    assert main(["estimate", "--model", "x"]) == 2
    line = _line(capsys)
    assert "\x1b" not in line
    assert len(line) < 3000


def test_interrupts_are_quiet(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    model.failure = KeyboardInterrupt()
    assert main(["estimate", "--model", "x"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_defect_shows_its_traceback(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    model.failure = ZeroDivisionError("here")
    assert main(["estimate", "--model", "x"]) == 70
    err = capsys.readouterr().err
    assert "ZeroDivisionError: here" in err
    assert "defect in peftplan" in err.splitlines()[-1]


def test_a_gpu_is_not_pretended(capsys: pytest.CaptureFixture[str]) -> None:
    if pytest.importorskip("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["profile", "--model", "llama-7b", "--device", "cuda"]) == 3
    assert "--device cuda: torch sees no GPU here" in _line(capsys)


PROFILES = {
    "--model x --limit 1GiB": "--limit: a trace has none",
    "--model x --history h": "--history: a trace has none",
    "--model x --budget 9m": "--budget: only a --campaign has one",
    "--model x --device cpu --history h": "--history: only CUDA's caching allocator keeps one",
    "--model x --device cpu --limit much": "cannot read 'much' as a size",
    "--campaign c.yaml --model x --out o": "--campaign states its own jobs",
    "--campaign c.yaml --limit 1GiB": "--limit: a campaign's file says",
    "--campaign c.yaml --device meta": "--device meta: a campaign is run",
    "--campaign c.yaml": "--campaign needs --out",
    "--campaign nowhere.yaml --out o": "nowhere.yaml: No such file",
    "--campaign nowhere.yaml --out o --budget soon": "cannot read 'soon' as a time",
}


@pytest.mark.parametrize("options", PROFILES)
def test_what_a_profile_cannot_be_is_one_line(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *options.split()]) == 2
    assert PROFILES[options] in _line(capsys)


@pytest.mark.usefixtures("model")
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "peftplan.instruments.trace", raising=False)
    assert main(["profile", "--model", "x"]) == 3
    assert 'pip install "peftplan[trace]"' in _line(capsys)


@pytest.mark.usefixtures("model")
def test_profile_holds_the_estimate_against_the_trace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Job, str]] = []
    monkeypatch.setitem(sys.modules, "peftplan.instruments.trace", _fake_tracer(asked))
    out = tmp_path / "trace.json"
    assert main(["profile", "--model", "x", "--out", str(out)]) == 0
    assert (asked[0][0].backend, asked[0][1]) == ("cpu", "fake")
    assert "equal" in capsys.readouterr().out
    assert json.loads(out.read_text())["schema"] == "peftplan.trace/1"
    assert main(["profile", "--model", "x", "--device", "meta", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peak_bytes"] == 1
    assert main(["profile", "--model", "x", "--out", str(tmp_path / "no" / "where.json")]) == 2
    assert "--out" in _line(capsys)


def _fake_tracer(asked: list[tuple[Job, str]]) -> ModuleType:
    answer = sample.estimate().model_dump(mode="json")
    memory = {name: answer["memory"][name] for name in ("static_bytes", "saved_for_backward_bytes")}
    traced = {
        **memory,
        "peak_bytes": 1,
        "parameters": answer["parameters"],
        "flops": {**answer["flops"], "recompute": 0, "total": 1},
        "versions": {"torch": "2.13.0"},
    }

    class Traced:
        def model_dump(self) -> dict[str, Any]:
            return traced

    def trace(job: Job, *, mode: str) -> Traced:
        asked.append((job, mode))
        return Traced()

    module = ModuleType("peftplan.instruments.trace")
    module.trace = trace  # type: ignore[attr-defined]
    return module


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    top = capsys.readouterr().out
    for command in ("estimate", "explain", "list", "profile"):
        assert command in top
        assert main([command, "--help"]) == 0
        assert f"Usage: peftplan {command}" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("peftplan ")
