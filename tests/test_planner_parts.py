"""The parts of a plan: what is asked, what is in the space, what was measured, what is said; and the command."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peftplan import Goal, Job, Plan, RequestError, estimate, plan
from peftplan.cli import main
from peftplan.hardware import find_gpu, hourly_usd
from peftplan.planner import rank
from peftplan.planner.bench import Bench
from peftplan.planner.desk import weigh
from peftplan.planner.goal import asked
from peftplan.planner.nearest import hopeful
from peftplan.planner.quality import evidence, rows
from peftplan.planner.seats import named_gpus
from peftplan.planner.space import Space, make_space
from peftplan.report import paper, plan_screen
from peftplan.resolve import resolve
from tests.test_planner import FIXED, WIDE
from tests.test_report import Stream

SMALL: dict[str, Any] = {
    "model": "small", "config": WIDE, "methods": "lora", "gpu": "rtx-4090", "seq_len": 512, "global_batch": 4, **FIXED,
}  # fmt: skip


def space(**fields: Any) -> Space:
    return make_space(*asked(None, {**SMALL, **fields}))


def values(found: Space, name: str) -> list[Any]:
    return list(dict.fromkeys(shape.update.get(name) for shape in found.shapes))


# -- what is asked ----------------------------------------------------------------------------------


WRONG = [
    ({"max_usd": 5}, "--max-usd needs how much to train on; give --tokens"),
    ({"max_hours": 5}, "--max-hours needs how much to train on; give --tokens"),
    ({"max_usd": 0, "tokens": 1}, "--max-usd: "),
    ({"objectives": "cost,beauty"}, "--objectives: give 'cost', 'time'"),
    ({"objectives": "cost,cost"}, "each once"),
    ({"methods": ""}, "--methods: input should name at least one"),
    ({"methods": "loora"}, "unknown method 'loora'; did you mean "),
    ({"gpu": "rtx-4090,rtx-409"}, "unknown GPU 'rtx-409'"),
    ({"gpu": " , "}, "--gpu names no GPU"),
    ({"gpu": "gaudi3"}, "memory is not modelled"),
    ({"min_seq_len": 1024}, "--seq-len 512 is below --min-seq-len 1024"),
    ({"min_rank": 32}, "--rank 16 is below --min-rank 32"),
    ({"backend": "cpu"}, "--backend cpu: a plan is for GPUs"),
    ({"task": "serve"}, "--task serve: a plan is for training"),
    ({"micro_batch": 3}, "--global-batch 4: no micro-batch and accumulation"),
    ({"rank": 64}, "--rank 64 is larger than the smaller side"),
    ({"target_modules": "nowhere"}, "nowhere"),
    ({"model": "no-such-model", "config": None}, "no-such-model"),
    ({"modle": "x"}, "unknown job field 'modle'"),
    ({"methods": "full", "rank": 8}, "--rank means nothing to method full"),
]


@pytest.mark.parametrize(("fields", "says"), WRONG)
def test_a_wrong_request_is_one_line(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        plan(**{**SMALL, **fields})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_job_and_its_fields_are_not_mixed() -> None:
    with pytest.raises(RequestError, match="put rank into the Job"):
        plan(Job(model="llama-7b"), rank=8)
    job = Job(**{name: value for name, value in SMALL.items() if name in Job.model_fields})
    assert plan(job, global_batch=4, methods="lora").best == plan(**SMALL).best


def test_objectives_named_come_first_and_the_rest_follow() -> None:
    assert Goal().order == ("cost", "time", "quality", "simplicity")
    assert Goal(objectives=("quality", "headroom")).order == ("quality", "headroom", "cost", "time", "simplicity")
    assert Goal(aim="smallest_change").order[0] == "simplicity"


def test_a_job_from_a_trainers_config_is_changed_least() -> None:
    assert asked(Job(model="llama-7b", trainer="axolotl"), {})[1].aim == "smallest_change"
    assert asked(Job(model="llama-7b", trainer="axolotl"), {"aim": "best"})[1].aim == "best"
    assert asked(Job(model="llama-7b"), {})[1].aim == "best"


# -- the space --------------------------------------------------------------------------------------


def test_what_is_given_is_fixed_and_the_rest_is_open() -> None:
    assert [values(space(), name) for name in ("method", "rank", "format")] == [["lora"], [16], ["bf16"]]
    assert values(space(), "target_modules") == [None, "all-linear"]
    assert values(space(), "micro_batch") == [4, 2, 1]
    assert values(space(rank=None, min_rank=12), "rank") == [12, 16, 32, 64]
    assert values(space(format=None), "format") == [None, "int8", "nf4"]
    assert values(space(methods="full", rank=None), "rank") == [None]
    assert values(space(seq_len=None, min_seq_len=700), "seq_len") == [700]


def test_only_what_is_modelled_is_in_it() -> None:
    for shape in space(attention=None, recompute=None).shapes:
        assert shape.update["offload"] is None
    assert values(space(attention=None, kernels=None), "kernels") == [None]
    assert values(space(kernels="liger"), "kernels") == ["liger"]
    assert values(space(methods="full", rank=None, format=None), "format") == [None]
    assert "flash_attention_2" not in values(space(attention=None, dtype="fp32", format=None), "attention")


def test_several_gpus_are_an_offer() -> None:
    found = space(gpus=2)
    assert {seat.cards for seat in found.seats} == {1, 2}
    assert found.refused_cards is None
    answer = plan(**{**SMALL, "gpus": 2})
    assert answer.best is not None


def test_no_gpu_means_every_common_one_with_a_price() -> None:
    cards = named_gpus(None)
    assert len(cards) >= 10
    assert all(hourly_usd(card) is not None for card in cards)
    assert [card.name for card in named_gpus("4090, l40s,rtx-4090")] == [find_gpu("4090").name, find_gpu("l40s").name]


def test_the_global_batch_is_kept() -> None:
    found = space(global_batch=12)
    for shape in found.shapes:
        assert (
            found.candidate(shape, found.seats[0], found.optimizers[0]).grad_accum * shape.update["micro_batch"] == 12
        )
    assert space(global_batch=None).global_batch == 8
    assert space(global_batch=None, micro_batch=3, grad_accum=5).global_batch == 15


# -- quality ----------------------------------------------------------------------------------------


def test_every_row_of_evidence_is_a_share_with_a_source() -> None:
    assert len(rows()) >= 8
    for row in rows():
        assert row.evidence.accuracy is not None
        assert 0 <= row.evidence.accuracy <= 1
        assert "huggingface/peft" in row.evidence.why


@pytest.mark.parametrize(
    ("fields", "accuracy", "why"),
    [
        ({"method": "lora", "rank": 64}, 0.4738, "2026-07-15"),
        ({"method": "rslora", "rank": 64}, 0.5133, "rslora"),
        ({"method": "full"}, 0.4716, "full-finetuning"),
        ({"method": "lora", "rank": 64, "target_modules": "all-linear"}, None, "rank 64 on q_proj, v_proj"),
        ({"method": "lora", "rank": 32}, None, "other settings"),
        ({"method": "lora", "rank": 64, "set": {"method.lora_dropout": 0.1}}, None, "other settings"),
        ({"method": "dora", "rank": 64}, None, "other settings"),
        ({"method": "qlora", "rank": 64}, None, "not with nf4"),
        ({"method": "lora", "rank": 64, "optimizer": "adamw_8bit"}, None, "AdamW only"),
        ({"method": "pissa", "rank": 64}, None, "other settings"),
        ({"method": "lora_plus", "rank": 64}, None, "no accuracy of lora_plus"),
        ({"method": "bitfit"}, None, "no accuracy"),
    ],
)
def test_quality_is_measured_for_the_same_setup_or_absent(
    fields: dict[str, Any], accuracy: float | None, why: str
) -> None:
    case = resolve(
        Job.model_validate({"model": "qwen2.5-7b" if fields["method"] == "bitfit" else "llama-7b", **fields})
    )
    found = evidence(case, case.optimizer)
    assert found.accuracy == accuracy
    assert why in found.why


def test_a_floor_of_quality_leaves_out_what_nobody_measured() -> None:
    answer = plan(model="llama-3.2-3b", methods="lora", gpu="a100-40gb", optimizer="adamw", min_quality=0.45,
                  format="bf16", attention="sdpa", global_batch=2)  # fmt: skip
    assert answer.best is not None
    assert (answer.best.job.rank, answer.best.quality) == (64, 0.4738)
    assert answer.counts.beyond_limits > 0
    assert all(entry.quality == 0.4738 for entry in answer.front)


# -- around the winner ------------------------------------------------------------------------------


def test_notches_say_what_they_buy_or_why_there_is_nothing() -> None:
    answer = plan(**SMALL)
    assert answer.best is not None
    notches = {notch.change.split()[0]: notch for notch in answer.notches}
    assert set(notches) == {"--gpus", "--gpu", "--seq-len", "--rank"}
    assert notches["--gpus"].entry is not None
    half, bigger, lower = (notches[name].entry for name in ("--seq-len", "--gpu", "--rank"))
    assert half is not None
    assert bigger is not None
    assert lower is not None
    assert (half.job.seq_len, lower.job.rank) == (256, 8)
    assert find_gpu(bigger.gpu).memory.marketed_bytes > find_gpu(answer.best.gpu).memory.marketed_bytes
    for entry in (half, bigger, lower):
        assert entry.job.micro_batch * entry.job.grad_accum == 4


def test_limits_that_nothing_keeps_name_what_comes_nearest() -> None:
    answer = plan(**{**SMALL, "tokens": 10**9, "max_usd": 0.01, "max_hours": 1e6})
    assert answer.best is None
    assert answer.closest is not None
    (miss,) = answer.closest.misses
    total = answer.closest.entry.usd_total
    assert total is not None
    assert miss.what == "--max-usd"
    assert miss.by == pytest.approx(total - 0.01)
    assert answer.closest.entry.verdict == "fits"
    generous = plan(**{**SMALL, "tokens": 10**9, "max_usd": total})
    assert generous.best is not None
    assert generous.best.job == answer.closest.entry.job


def test_shapes_ruled_out_by_a_smaller_one_cannot_fit() -> None:
    found = make_space(*asked(None, {**SMALL, "seq_len": 4096, "global_batch": 16, "aim": "smallest_change"}))
    alive = {id(shape) for shape in hopeful(found)}
    dead = [c for c in weigh(found).candidates if id(c.shape) not in alive]
    assert not any(c.may_fit for c in dead)


def test_what_rules_out_a_candidate_is_certain() -> None:
    """Peak and context are no more than the card holds."""
    found = space(attention=None, recompute=None)
    bench = Bench(found.job)
    for c in weigh(found).candidates:
        memory = bench.estimate(c).memory
        assert memory.device_bytes is not None
        assert memory.device_bytes >= c.figures.peak_bytes


def test_a_difference_that_is_not_shown_does_not_decide() -> None:
    assert rank.shown(0.078561) == rank.shown(0.078569)
    assert rank.shown(0.0786) < rank.shown(0.0787)


# -- what is said -----------------------------------------------------------------------------------


def _screen(answer: Plan, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    return paper.render(plan_screen.render(answer), Stream())


def test_the_screen_says_what_to_run_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = plan(**{**SMALL, "tokens": 10**8, "gpu": "rtx-4090,l40s"})
    text = _screen(answer, monkeypatch)
    for part in (" RUN ", "Ranking", "Pareto front", "One notch more or less", "Still fits", "2 lost: costs $"):
        assert part in text
    assert len(text.split("\n")) <= 50
    assert max(map(len, text.split("\n"))) <= 100


def test_the_screen_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = plan(**{**SMALL, "seq_len": 4096, "micro_batch": 16, "global_batch": None, "gpu": "rtx-3060"})
    text = _screen(answer, monkeypatch)
    assert "NOTHING FITS" in text
    assert "bytes more than the card has" in text
    assert "What would make it fit" in text


def test_the_answer_is_frozen_and_survives_json() -> None:
    answer = plan(**SMALL)
    assert Plan.model_validate_json(answer.to_json()).to_json() == answer.to_json()
    assert json.loads(answer.to_json())["schema"] == "peftplan.plan/1"
    with pytest.raises(ValueError, match="frozen"):
        answer.best = None
    assert answer.best is not None
    assert answer.estimate is not None
    assert answer.estimate.memory == estimate(answer.best.job).memory
    assert answer.estimate.fit.headroom_bytes == answer.best.headroom_bytes


COMMAND = "plan --model llama-7b --method lora --rank 8 --target-modules q_proj,v_proj --format bf16 --optimizer adamw"


def test_the_command_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND.split(), "--gpu", "l40s,rtx-4090", "--recompute", "full", "--json"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (answer["schema"], err) == ("peftplan.plan/1", "")
    assert answer["best"]["job"]["gpu"] in ("NVIDIA L40S", "NVIDIA GeForce RTX 4090")


def test_nothing_fits_is_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    line = [*COMMAND.split(), "--gpu", "t4", "--micro-batch", "1", "--recompute", "full", "--attention", "sdpa"]
    assert main([*line, "--kernels", "hf", "--offload", "none"]) == 0
    assert "NOTHING FITS" in capsys.readouterr().out


def test_a_wrong_plan_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "llama-7b", "--max-usd", "much"]) == 2
    assert capsys.readouterr().err.startswith("error: --max-usd: give a number")


# -- what is modelled later -------------------------------------------------------------------------


def test_what_resolve_accepts_enters_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several GPUs, kernels and offload as if they were modelled: here they change nothing but the price."""
    monkeypatch.setattr("peftplan.resolve._check_unmodelled", lambda _: None)
    monkeypatch.setattr("peftplan.arrangement.unmodelled", lambda _: None)
    found = space(gpus=3, kernels=None)
    assert {seat.cards for seat in found.seats} == {1, 2, 3}
    assert {seat.layout for seat in found.seats if seat.cards > 1} >= {"ddp", "fsdp"}
    assert found.refused_cards is None
    assert all(found.global_batch % seat.cards == 0 or not _batches(found, seat) for seat in found.seats)
    fields = {**SMALL, "target_modules": "q_proj,v_proj", "kernels": "hf", "offload": "none", "gpus": 2}
    answer = plan(**fields)
    assert answer.best is not None
    assert answer.best.gpus == 1
    twice = next(entry for entry in answer.ranking if entry.gpus == 2)
    assert twice.usd_per_hour == 2 * (answer.best.usd_per_hour or 0)
    assert twice.job.micro_batch * twice.job.grad_accum * 2 == 4
    assert next(notch for notch in answer.notches if notch.change == "--gpus 2").entry is not None


def _batches(found: Space, seat: Any) -> list[int | None]:
    return [times for shape in found.shapes if (times := found.grad_accum(shape, seat)) is not None]
