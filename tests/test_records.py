"""Records: what is sound loads, what is not is named, and a comparison says which memory it compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftplan.accuracy import compare, predicted_bytes, summarize
from peftplan.errors import BadFile, RequestError, Unsupported
from peftplan.job import Job
from peftplan.records import MAX_LINE_BYTES, Measured, Record, add, load, parse, save
from peftplan.report.accuracy_text import table
from peftplan.result import Cost, Estimate, Flops, Held, Late, Memory, Parameters, Time
from peftplan.units import GIB

PUBLISHED = Path(__file__).parents[1] / "profiles" / "published"


def record(identity: str = "a", **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "id": identity,
        "kind": "published",
        "source": "somebody/repo:file.csv",
        "source_rev": "abc",
        "date": "2026-01",
        "gpu": "T4",
        "job": {"model": "llama-7b", "method": "lora"},
        "measured": [{"kind": "allocated_peak", "bytes": 10 * GIB}],
        "setup_known": "full",
    }
    return Record.model_validate(fields | changes)


def estimate_of(job: Job, *, peak: int = 9 * GIB, reserved: int | None = 11 * GIB) -> Estimate:
    memory = Memory(
        peak_bytes=peak,
        static_bytes=4 * GIB,
        saved_for_backward_bytes=0,
        at_peak={"weight": peak},
        at_peak_phase="backward",
        phases={"forward": 7 * GIB, "loss": 8 * GIB, "backward": peak, "optimizer": 5 * GIB},
    ).holding(Late(lambda: Held(reserved, 12 * GIB)))
    return Estimate(
        version="test",
        job=job,
        parameters=Parameters(total=1, trainable=1, stored_bytes=3 * GIB),
        memory=memory,
        flops=Flops(forward=1, backward=1, recompute=0, optimizer=0, total=2),
        time=Time(step_seconds=None, tokens_per_second=None, mfu=None, breakdown=None),
        cost=Cost(usd_per_hour=None, usd_per_million_tokens=None, usd_total=None, energy_kwh=None),
        assumptions=(),
        schema="peftplan.estimate/1",
    )


def test_saved_records_come_back_equal(tmp_path: Path) -> None:
    written = [record("a"), record("b", gaps=("x",), trainable_params=7)]
    save(tmp_path / "sub" / "some.jsonl", written)
    assert list(load(tmp_path)) == written
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["some.jsonl"], "no temporary file is left"


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    save(path, [record("old")])

    def broken() -> Any:
        yield record("new")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        save(path, broken())
    assert [found.id for found in load(tmp_path)] == ["old"]
    assert [found.name for found in tmp_path.iterdir()] == ["some.jsonl"]


def test_bad_lines_are_named_and_the_rest_loads(tmp_path: Path) -> None:
    good = record("good").to_line()
    newer = good.replace("peftplan.record/1", "peftplan.record/9")
    strange = good.replace("peftplan.record/1", "something/1")
    missing = json.dumps({"schema": "peftplan.record/1", "id": "m"})
    lines = [
        good,
        "",
        good[: len(good) // 2],
        good,
        newer,
        strange,
        "[1]",
        missing,
        "x" * (MAX_LINE_BYTES + 1),
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    (tmp_path / "z.jsonl").write_bytes(b"\xff\xfe\n" + record("late").to_line().encode())
    loaded = load(tmp_path)
    assert [found.id for found in loaded] == ["good", "late"]
    reasons = [problem.split(": ", 1)[1] for problem in loaded.problems]
    places = [problem.split(": ", 1)[0].rsplit("/", 1)[1] for problem in loaded.problems]
    assert places == [*(f"mixed.jsonl:{n}" for n in (3, 4, 5, 6, 7, 8, 9)), "z.jsonl:1"]
    assert "cut off or corrupt" in reasons[0]
    assert "id 'good' was already taken" in reasons[1]
    assert "newer than this peftplan reads" in reasons[2]
    assert "'something/1' is not peftplan.record/1" in reasons[3]
    assert "a JSON object is expected" in reasons[4]
    assert reasons[5].startswith("record 'm': kind: field required (and ")
    assert "more than any record has" in reasons[6]


def test_a_record_is_added_or_replaces_the_one_of_its_id(tmp_path: Path) -> None:
    path = tmp_path / "new" / "some.jsonl"
    assert add(path, record("a")) == ()
    assert add(path, record("b")) == ()
    assert add(path, record("a", gpu="L4")) == ()
    assert [(found.id, found.gpu) for found in load(tmp_path)] == [("a", "L4"), ("b", "T4")]
    assert [found.name for found in path.parent.iterdir()] == ["some.jsonl"]


def test_what_is_no_record_is_kept_aside_when_one_is_added(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    good = record("good").to_line()
    newer = good.replace("peftplan.record/1", "peftplan.record/2")
    path.write_bytes(b"\n".join([good.encode(), good[:50].encode(), newer.encode(), b"\xff\xfe", good.encode()]))
    problems = add(path, record("more"))
    reasons = ("cut off or corrupt", "newer than this peftplan reads", "cut off or corrupt", "was already taken")
    assert len(problems) == len(reasons)
    for line, (problem, reason) in zip((2, 3, 4, 5), zip(problems, reasons, strict=True), strict=True):
        assert problem.startswith(f"{path}:{line}: ")
        assert reason in problem
    assert [found.id for found in load(tmp_path)] == ["good", "more"]
    aside = (tmp_path / "some.jsonl.rejected").read_bytes().split(b"\n")
    assert aside == [good[:50].encode(), newer.encode(), b"\xff\xfe", good.encode(), b""]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFile, match=r"Not a directory|File exists"):
        add(tmp_path / "file" / "some.jsonl", record())


def test_the_fields_of_a_later_version_are_refused_by_name() -> None:
    """A field that this version does not know may change what the others mean."""
    line = json.loads(record("a").to_line())
    with pytest.raises(BadFile, match="record 'a': invented: extra inputs are not permitted"):
        parse(json.dumps({**line, "invented": 1}))
    with pytest.raises(BadFile, match=r"record 'a': measured\.0\.kind"):
        parse(json.dumps({**line, "measured": [{"kind": "allocated_somehow", "bytes": 1}]}))


def test_each_record_says_how_it_was_run_or_nothing() -> None:
    assert '"run"' not in record().to_line(), "published records stay as they are"
    ran = record(run={"warm_up_steps": 2, "step_seconds": [0.1, 0.2], "sm_clock_mhz": 1980})
    assert parse(ran.to_line()) == ran


def test_deep_nesting_is_a_problem_not_a_crash() -> None:
    with pytest.raises(BadFile, match="corrupt"):
        parse("[" * 100_000)


def test_a_missing_folder_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="is not a folder of records"):
        load(tmp_path / "nowhere")


def test_unexplained_extra_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond_model_why"):
        Measured(kind="reserved_peak", bytes=1, beyond_model_bytes=5)


def test_a_value_under_another_kind_is_refused() -> None:
    allocated, reserved = ({"kind": kind, "bytes": size * GIB} for kind, size in (("allocated_peak", 9), ("device", 8)))
    with pytest.raises(ValueError, match="is one of them mislabelled"):
        record(measured=[allocated, reserved])


def test_a_run_says_what_it_measured_or_that_it_ran_out_of_memory() -> None:
    with pytest.raises(ValueError, match="must have measured something"):
        record(measured=[])
    assert record(measured=[], out_of_memory=True).measured == ()


def test_each_kind_of_memory_meets_its_own_prediction() -> None:
    job = record().to_job()
    estimate = estimate_of(job)
    expected = {
        "allocated_peak": 9,
        "reserved_peak": 11,
        "device": 12,
        "allocated_resident": 3,
        "allocated_between_steps": 4,
        "allocated_peak_forward": 8,
        "allocated_peak_backward": 9,
        "allocated_peak_optimizer": 5,
        "allocated_peak_loss": 8,
    }
    for kind, gib in expected.items():
        value = Measured.model_validate({"kind": kind, "bytes": 1})
        assert predicted_bytes(estimate, value) == gib * GIB


def test_known_extras_are_added_to_the_prediction() -> None:
    value = Measured(kind="allocated_peak", bytes=1, beyond_model_bytes=GIB, beyond_model_why="kept by the loop")
    assert predicted_bytes(estimate_of(record().to_job()), value) == 10 * GIB


def test_compare_judges_what_it_can_and_says_why_not() -> None:
    records = [
        record("judged"),
        record("gap", gaps=("fused kernels",)),
        record("refused", job={"model": "unknown-model"}),
        record("broken", job={"model": "x", "rank": 0}),
        record("open", measured=[{"kind": "reserved_peak", "bytes": GIB}]),
    ]

    def predict(job: Job) -> Estimate:
        if job.model == "unknown-model":
            raise Unsupported("not this one")
        return estimate_of(job, reserved=None)

    rows = {row.id: row for row in compare(records, predict)}
    assert rows["judged"].error == pytest.approx(-0.1)
    assert rows["gap"].note == "not modelled: fused kernels"
    assert rows["refused"].note == "refused: not this one"
    assert rows["broken"].note.startswith("refused: --rank")
    assert rows["open"].note == "the estimate leaves this open"
    summary = summarize(rows.values())
    assert (summary.rows, summary.judged, summary.under_5_percent) == (5, 1, 1)
    assert summary.median_abs == pytest.approx(0.1)


def test_tables_name_the_memory_and_end_in_the_summary() -> None:
    rows = compare([record("a|b")], estimate_of)
    text = table(rows).splitlines()
    assert text[0].split() == ["record", "memory", "measured", "GiB", "predicted", "GiB", "error", "note"]
    assert text[1].split() == ["a|b", "allocated_peak", "10.000", "9.000", "-10.0%"]
    assert text[-1].startswith("1 of 1 values judged: median absolute error 10.00%")
    markdown = table(rows, style="markdown").splitlines()
    assert markdown[2] == "| a\\|b | allocated_peak | 10.000 | 9.000 | -10.0% |  |"
    assert table([]).endswith("0 values, none of them judged")


def test_the_published_records_are_sound() -> None:
    loaded = load(PUBLISHED)
    assert loaded.problems == ()
    assert len(loaded) > 200
    known = {found.id for found in loaded}
    for found in loaded:
        try:
            found.to_job()
        except RequestError as error:
            pytest.fail(f"{found.id}: {error}")
        assert found.same_setup_as is None or found.same_setup_as in known
