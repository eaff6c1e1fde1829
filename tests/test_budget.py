"""Budgets: what passes, what fails and on which line, what cannot be judged; files, bases, exit codes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from peftplan import Check, Job, Limits, RequestError, check, estimate
from peftplan.budget import Judged, files, levers
from peftplan.budget.answers import Answers
from peftplan.budget.levers import Place
from peftplan.budget.limits import make_limits
from peftplan.revisions import texts_at

TINY = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
JOB = """\
# a small run
model: tiny/config.json
method: lora
rank: 8
micro_batch: 8
seq_len: 256
gpu: rtx-4090
"""
TRL = """\
model_name_or_path: tiny/config.json
use_peft: true
lora_r: 8
per_device_train_batch_size: 8
max_length: 256
learning_rate: 1.0e-4
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a small model, a job file and a TRL config; the working directory of the test."""
    import json

    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "trl.yaml").write_text(TRL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _git(*arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def committed(folder: Path) -> Path:
    _git("init", "-q")
    _git("add", "-A")
    _git("commit", "-qm", "base")
    return folder


def _device(file: str) -> int:
    (result,) = check(file, limits=Limits(max_memory="9TB")).results
    assert result.device_bytes is not None
    return result.device_bytes


def _one(answer: Check) -> Judged:
    (result,) = answer.results
    return result


def _between(low: int, high: int) -> str:
    return f"{(low + high) // 2}"


# -- a budget that breaks, and the line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "line", "before", "after"),
    [
        ("job.yaml", 5, "micro_batch: 8", "micro_batch: 16"),
        ("job.yaml", 6, "seq_len: 256", "seq_len: 512"),
        ("trl.yaml", 4, "per_device_train_batch_size: 8", "per_device_train_batch_size: 16"),
    ],
)
@pytest.mark.usefixtures("committed")
def test_a_one_line_change_that_breaks_a_budget_is_named(file: str, line: int, before: str, after: str) -> None:
    path = Path(file)
    fits = path.read_text()
    breaks = fits.replace(before, after)
    path.write_text(breaks)
    large = _device(file)
    path.write_text(fits)
    limits = Limits(max_memory=_between(_device(file), large))
    assert check(file, limits=limits, base="HEAD").exit_code == 0
    path.write_text(breaks)
    for base in ("HEAD", None):
        broken = check(file, limits=limits, base=base)
        named = _one(broken).levers
        assert broken.exit_code == 1
        assert (file, line, after) in [(lever.file, lever.line, lever.text) for lever in named]
        assert all(lever.saves is not None and lever.saves > 0 for lever in named)
        assert [lever.change for lever in named] == (["changed"] if base else ["drives"] * len(named))


@pytest.mark.usefixtures("committed")
def test_a_word_that_costs_is_named() -> None:
    Path("job.yaml").write_text("model: llama-7b\nmethod: lora\nmicro_batch: 1\nseq_len: 128\n")
    _git("commit", "-qam", "large")
    Path("job.yaml").write_text("model: llama-7b\nmethod: full\nmicro_batch: 1\nseq_len: 128\n")
    for base in ("HEAD", None):
        (lever,) = _one(check("job.yaml", limits=Limits(max_memory="24GB"), base=base)).levers
        assert (lever.line, lever.text) == (2, "method: full")


@pytest.mark.usefixtures("committed")
def test_among_many_changed_lines_those_that_cost_come_first_and_the_rest_is_not_blamed() -> None:
    text = TRL.replace("1.0e-4", "2.0e-4").replace("lora_r: 8", "lora_r: 16").replace("size: 8", "size: 64")
    Path("trl.yaml").write_text("# why\n" + text)
    result = _one(check("trl.yaml", limits=Limits(max_growth="0%"), base="HEAD"))
    assert [lever.line for lever in result.levers] == [5, 4]
    assert result.base_device_bytes is not None
    assert result.base_device_bytes < (result.device_bytes or 0)


@pytest.mark.usefixtures("committed")
def test_a_removed_and_an_added_line_are_named() -> None:
    _git("rm", "-q", "--cached", "trl.yaml")
    Path("job.yaml").write_text(JOB + "recompute: full\n")
    _git("commit", "-qam", "recompute")
    Path("job.yaml").write_text(JOB)
    removed = _one(check("job.yaml", limits=Limits(max_growth="0MiB"), base="HEAD")).levers[0]
    assert (removed.change, removed.text) == ("removed", "recompute: full")
    Path("job.yaml").write_text(JOB + "recompute: full\nattention: eager\n")
    added = _one(check("job.yaml", limits=Limits(max_memory="1MiB"), base="HEAD")).levers[0]
    assert (added.change, added.line, added.text) == ("added", 9, "attention: eager")


@pytest.mark.usefixtures("committed")
def test_a_change_that_costs_nothing_is_not_blamed_for_a_budget_that_was_broken_before() -> None:
    Path("trl.yaml").write_text(TRL.replace("1.0e-4", "3.0e-4"))
    named = _one(check("trl.yaml", limits=Limits(max_memory="1MiB"), base="HEAD")).levers
    assert {(lever.change, lever.line) for lever in named} == {("drives", 4), ("drives", 5)}


def test_where_no_value_can_be_lowered_the_model_is_named() -> None:
    Path("bare.yaml").write_text("\nmodel: tiny/config.json\n")
    lever = _one(check("bare.yaml", limits=Limits(max_memory="1MiB"))).levers[0]
    assert (lever.line, lever.text, lever.saves) == (2, "model: tiny/config.json", None)


def test_lines_are_found_in_json_and_in_toml() -> None:
    Path("job.json").write_text('{\n  "model": "tiny/config.json",\n  "seq_len": 256,\n  "micro_batch": 8\n}\n')
    named = _one(check("job.json", limits=Limits(max_memory="1MiB"))).levers
    assert {(lever.line, lever.text) for lever in named} == {(3, "seq_len: 256"), (4, "micro_batch: 8")}
    Path("peftplan.toml").write_text(
        'max-memory = "1MiB"\n[[budgets]]\njob = { model = "tiny/config.json", micro_batch = 64, rank = 2 }\n'
    )
    (lever,) = _one(check()).levers
    assert (lever.file, lever.line, lever.text) == ("peftplan.toml", 3, "micro_batch: 64")


def test_line_ends_are_no_change_and_lines_are_counted_as_editors_do() -> None:
    place = Place(file="a.yaml", measure=lambda text: 8 if "b: 4" in text else 4, unit="bytes")
    (lever,) = levers.changed("a: 1 # \u2028\r\n\r\nb: 4\r\n", "a: 1 # \u2028\n\nb: 2\n", place)
    assert (lever.line, lever.text, lever.instead, lever.saves) == (3, "b: 4", "b: 2", 4)


def test_a_switch_is_turned_to_see_what_it_costs() -> None:
    def measure(text: str) -> int:
        return 10 if "checkpointing: false" in text else 5

    place = Place(file="a.yaml", measure=measure, unit="bytes")
    (lever,) = levers.driving("a: 1\ncheckpointing: false  # slow\nb: 3\n", place)
    assert (lever.line, lever.instead, lever.saves) == (2, "true", 5)


# -- limits -----------------------------------------------------------------------------------------------------


def test_every_limit_is_judged() -> None:
    job = Job(model="llama-7b", method="qlora", gpu="rtx-4090", tokens=10**7, micro_batch=1)
    cheap = check(job, limits=Limits(gpu="h100", max_memory="80GB", max_usd=1e6, max_hours=1e6))
    assert (cheap.exit_code, {h.limit for h in _one(cheap).limits}) == (
        0, {"gpu", "max_memory", "max_usd", "max_hours"},
    )  # fmt: skip
    for broken in (Limits(max_memory="1GB"), Limits(max_usd=0.001), Limits(max_hours=0.001), Limits(gpu="rtx-3060")):
        assert check(job.model_copy(update={"micro_batch": 8}), limits=broken).exit_code == 1


def test_hours_and_dollars_are_those_of_the_estimate() -> None:
    job = Job(model="llama-7b", method="qlora", gpu="h100")
    result = _one(check(job, limits=Limits(max_usd=1e9, tokens=10**8, usd_per_hour=2.0)))
    answer = estimate(job.model_copy(update={"tokens": 10**8, "usd_per_hour": 2.0}))
    assert result.usd_total == answer.cost.usd_total
    assert result.hours == pytest.approx((answer.cost.usd_total or 0) / 2)


def test_tight_passes_unless_only_fits_is_accepted() -> None:
    jobs = [Job(model="llama-7b", method="qlora", micro_batch=n, gpu="rtx-4090") for n in range(9, 14)]
    job = next(job for job in jobs if estimate(job).fit.verdict == "tight")
    assert check(job, limits=Limits()).exit_code == 0
    assert check(job, limits=Limits(accept="fits")).exit_code == 1


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (Limits(max_hours=3), "no GPU named"),
        (Limits(gpu="h100", max_usd=3), "tokens"),
        (Limits(max_growth="5%"), "--base"),
        (Limits(), "no limit to hold it against"),
    ],
)
def test_what_cannot_be_judged_does_not_pass(limits: Limits, says: str) -> None:
    answer = check("trl.yaml", limits=limits)
    assert answer.exit_code == 2
    assert says in str(_one(answer).error)


def test_what_the_cpu_needs_of_a_card_is_unknown() -> None:
    job = Job(model="llama-7b", backend="cpu")
    assert "the cpu backend uses no device" in str(_one(check(job, limits=Limits(max_memory="80GB"))).error)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_memory": "24cows"}, "here: max_memory: cannot read '24cows' as a size"),
        ({"max_memory": "-24GB"}, "cannot read '-24GB'"),
        ({"max_memory": 24}, "max_memory: 24 has no unit; write it like 24GB"),
        ({"max_memory": True}, "should not be true or false"),
        ({"max_usd": -1}, "max_usd: input should be greater than or equal to 0, not -1"),
        ({"max_hours": float("nan")}, "finite"),
        ({"max_growth": 5}, "neither bytes nor percent"),
        ({"max_growth": "-5%"}, "cannot read '-5%' as a growth"),
        ({"max_growth": "x%"}, "cannot read 'x%' as a growth"),
        ({"gpu": "h1000"}, "unknown GPU 'h1000'; did you mean h100"),
        ({"accept": "maybe"}, "accept: input should be 'fits' or 'tight'"),
        ({"max_memroy": "3GB"}, "unknown key 'max_memroy'; did you mean max_memory"),
        ({"tokens": 0}, "tokens"),
    ],
)
def test_a_wrong_limit_is_one_line(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        make_limits(fields, where="here: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_growth_is_bytes_or_a_share() -> None:
    share, size = Limits(max_growth="2.5%").growth, Limits(max_growth="10MiB").growth
    assert share is not None
    assert size is not None
    assert (share.allowed_bytes(1000), size.allowed_bytes(1000)) == (25, 10 * 2**20)


# -- budget files -----------------------------------------------------------------------------------------------


def test_a_broken_file_among_many_is_reported_and_the_others_are_judged() -> None:
    Path("bad.yaml").write_text("model: [\n")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    Path("empty.yaml").write_text("")
    Path("peftplan.toml").write_text('configs = ["*.yaml", "gone.yaml", "none/*.json"]\nmax_memory = "9TB"\n')
    answer = check()
    by_name = {result.config: result for result in answer.results}
    assert {name for name, result in by_name.items() if result.status == "within"} == {"job.yaml", "trl.yaml"}
    assert answer.exit_code == 2
    for name, says in {
        "bad.yaml": "line 2", "binary.yaml": "not a text file", "empty.yaml": "found nothing",
        "gone.yaml": "No such file", "none/*.json": "matches no file",
    }.items():  # fmt: skip
        assert says in str(by_name[name].error)
        assert name in str(by_name[name].error)


def test_a_value_that_no_trainer_takes_is_one_result() -> None:
    Path("trl.yaml").write_text(TRL.replace("max_length: 256", "max_length: [a, {b: c}]"))
    wrong, right = check("trl.yaml", "job.yaml", limits=Limits(max_memory="9TB")).results
    assert str(wrong.error).startswith("trl.yaml: ")
    assert "['a', {'b': 'c'}]" in str(wrong.error)
    assert right.status == "within"


def test_a_file_named_twice_in_a_budget_is_judged_once() -> None:
    Path("peftplan.toml").write_text('configs = ["*.yaml", "job.yaml", "./job.yaml"]\nmax_memory = "9TB"\n')
    assert [result.config for result in check().results] == ["job.yaml", "trl.yaml"]


def test_broken_weighs_more_than_over() -> None:
    Path("bad.yaml").write_text("model: [\n")
    assert check("bad.yaml", "job.yaml", limits=Limits(max_memory="1MiB")).exit_code == 2


def test_pyproject_and_the_folder_above(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "pyproject.toml").write_text('[tool.peftplan]\nconfigs = "job.yaml"\nmax-memory = "9TB"\n')
    (folder / "job.yaml").write_text("model: llama-7b\nmethod: qlora\n")
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "deep" / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    monkeypatch.chdir(folder / "deep" / "deeper")
    (result,) = check().results
    assert (result.status, Path(result.config).resolve()) == ("within", folder / "job.yaml")


def test_the_limits_of_an_entry_go_before_those_of_the_top() -> None:
    Path("peftplan.toml").write_text(
        'max_memory = "9TB"\ngpu = "h100"\n'
        '[[budgets]]\nconfigs = ["job.yaml"]\n'
        '[[budgets]]\nname = "small"\nconfigs = ["job.yaml"]\nmax_memory = "1MiB"\n'
    )
    first, second = check().results
    assert (first.status, first.budget, first.gpu) == ("within", "budget 1", "NVIDIA H100 SXM5 80GB")
    assert (second.status, second.budget) == ("over", "small")


def test_named_files_pick_from_the_budget_file() -> None:
    Path("peftplan.toml").write_text('configs = ["*.yaml"]\nmax_memory = "9TB"\n')
    assert [result.config for result in check("./job.yaml").results] == ["job.yaml"]
    with pytest.raises(RequestError, match=r"other\.yaml: no budget of peftplan\.toml covers it"):
        check("other.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("configs = [", "not valid TOML"),
        ("max_memory = '3GB'", "states no budget"),
        ("budgets = 3", "headed [[budgets]]"),
        ("configs = 3", "list of files or globs"),
        ("configs = ['a']\njob = {model = 'x'}", "give either `configs`"),
        ("[[budgets]]\nname = 'x'", "give either `configs`"),
        ("job = 3", "table of a job's fields"),
        ("[[budgets]]\nconfig = ['a']\njob = {model = 'x'}", "unknown key 'config'; did you mean configs"),
        ("max_memroy = '3GB'\nconfigs = ['job.yaml']", "did you mean max_memory"),
    ],
)
def test_a_wrong_budget_file_is_one_line(text: str, says: str) -> None:
    Path("peftplan.toml").write_text(text)
    with pytest.raises(RequestError) as caught:
        check()
    assert says in str(caught.value)
    assert str(caught.value).startswith("peftplan.toml: ")


def test_a_job_in_the_budget_file_that_is_wrong_is_one_result() -> None:
    Path("peftplan.toml").write_text(
        "max_memory = '9TB'\n[[budgets]]\njob = {modell = 'x'}\n[[budgets]]\njob = {model = 'tiny/config.json'}\n"
    )
    wrong, right = check().results
    assert "unknown job field 'modell'; did you mean model" in str(wrong.error)
    assert right.status == "within"


def test_requests_that_make_no_sense() -> None:
    with pytest.raises(RequestError, match="no budgets"):
        check()
    with pytest.raises(RequestError, match="limits need a configuration"):
        check(limits=Limits(max_memory="1GB"))
    with pytest.raises(RequestError, match="not both"):
        check("job.yaml", limits=Limits(max_memory="1GB"), budgets="peftplan.toml")
    assert files.find(Path.cwd()) is None


# -- bases ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("committed")
def test_a_file_is_read_at_its_base_and_a_new_one_has_none(folder: Path) -> None:
    Path("job.yaml").write_text("changed\n")
    Path("new.yaml").write_text(JOB)
    assert texts_at("HEAD", [Path("job.yaml"), Path("new.yaml")]) == {Path("job.yaml"): JOB, Path("new.yaml"): None}
    result = _one(check("new.yaml", limits=Limits(max_growth="0%"), base="HEAD"))
    assert (result.status, result.limits[-1].why) == ("within", "new since HEAD")
    assert (folder / "job.yaml").read_text() == "changed\n"


@pytest.mark.usefixtures("committed")
def test_the_job_of_a_budget_grows_against_the_budget_file_of_the_base() -> None:
    text = "max_growth = '1%'\n[[budgets]]\nname = 'a'\njob = {model = 'tiny/config.json', micro_batch = 8}\n"
    Path("peftplan.toml").write_text(text)
    _git("add", "-A")
    _git("commit", "-qm", "budget")
    other = "[[budgets]]\nname = 'b'\njob = {model = 'tiny/config.json'}\n"
    Path("peftplan.toml").write_text(text.replace("[[budgets]]", other + "[[budgets]]").replace("= 8", "= 512"))
    new, grown = check(base="HEAD").results
    assert (new.status, new.limits[-1].why[:8]) == ("within", "not read")
    assert (grown.status, grown.levers[0].line) == ("over", 7)


@pytest.mark.usefixtures("committed")
@pytest.mark.parametrize("revision", ["nope", "-x", "", "a b", "HEAD:job.yaml"])
def test_an_unknown_revision_is_one_line(revision: str) -> None:
    with pytest.raises(RequestError, match="revision"):
        check("job.yaml", limits=Limits(max_growth="1%"), base=revision)


@pytest.mark.usefixtures("committed")
def test_a_shallow_clone_is_told_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("job.yaml").write_text(JOB + "# more\n")
    _git("commit", "-qam", "second")
    _git("clone", "-q", "--depth", "1", tmp_path.as_uri(), "shallow")
    monkeypatch.chdir(tmp_path / "shallow")
    with pytest.raises(RequestError, match="unknown revision 'HEAD~1'; this clone is shallow"):
        check("job.yaml", limits=Limits(max_growth="1%"), base="HEAD~1")


def test_a_base_needs_a_repository() -> None:
    with pytest.raises(RequestError, match=r"job\.yaml: not in a git repository"):
        check("job.yaml", limits=Limits(max_growth="1%"), base="HEAD")


# -- answers ----------------------------------------------------------------------------------------------------


def test_equal_questions_share_an_answer_and_processes_change_nothing() -> None:
    jobs = [Job(model="llama-7b", config=TINY, micro_batch=n, seq_len=64) for n in range(1, 20)]
    alone = check(*jobs, limits=Limits(max_memory="1GB", gpu="t4"))
    assert check(*jobs, limits=Limits(max_memory="1GB", gpu="t4"), workers=2) == alone
    answers = Answers()
    first = answers.of(jobs[0])
    assert answers.of(jobs[0].model_copy(update={"extras": {"learning_rate": 1}})) is first


def test_a_wrong_job_ahead_is_answered_by_its_error() -> None:
    jobs = [Job(model="llama-7b", config=TINY, micro_batch=n) for n in range(1, 17)]
    answer = check(*jobs, Job(model="llama-77b"), limits=Limits(max_memory="9TB"), workers=2)
    assert [result.status for result in answer.results] == ["within"] * 16 + ["error"]
    assert "unknown model 'llama-77b'" in str(answer.results[-1].error)


def test_the_answer_is_frozen_and_read_back_from_its_json() -> None:
    answer = check("job.yaml", limits=Limits(max_memory="1MiB"))
    assert Check.model_validate_json(answer.model_dump_json(by_alias=True)) == answer
    with pytest.raises(ValueError, match="frozen"):
        answer.status = "within"
