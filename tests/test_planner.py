"""plan() against brute force: every candidate estimated for itself, every verdict asked for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftplan import Estimate, Job, Plan, RequestError, estimate, plan
from peftplan.planner.desk import weigh
from peftplan.planner.goal import Goal, asked
from peftplan.planner.rank import shown
from peftplan.planner.result import Entry
from peftplan.planner.seats import Seat
from peftplan.planner.space import Choice, Space, make_space

LAW = settings(deadline=None, max_examples=6, derandomize=True)
CARDS = ("t4", "rtx-3060", "rtx-4090", "l4", "a100-40gb", "h100")
WIDE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "vocab_size": 200_000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096,
}
"""Two small layers under a vocabulary whose logits fill a card: verdicts of all kinds, replayed in milliseconds."""

FIXED = {"optimizer": "adamw", "recompute": "none", "attention": "sdpa", "format": "bf16", "rank": 16, "kernels": "hf"}
"""What keeps a space small; a question leaves one or two of them open."""


@st.composite
def questions(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of a small plan: some choices fixed, some left open."""
    fields: dict[str, Any] = {
        "model": "drawn",
        "config": WIDE,
        "gpu": ",".join(draw(st.lists(st.sampled_from(CARDS), min_size=1, max_size=3, unique=True))),
        "methods": draw(st.sampled_from(("lora", "qlora,full"))),
        "seq_len": draw(st.sampled_from((300, 1100, 2048))),
        "global_batch": draw(st.sampled_from((4, 6))),
        "tokens": 10**8,
        "objectives": draw(st.sampled_from((None, "time", "quality,cost", "headroom"))),
        "max_usd": draw(st.sampled_from((None, 0.5, 2.0, 10.0))),
        "most": draw(st.sampled_from((1, 3, 100))),
        **FIXED,
    }
    for name in draw(st.lists(st.sampled_from(sorted(FIXED)), min_size=1, max_size=2, unique=True)):
        del fields[name]
    return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Known:
    """One candidate, estimated for itself."""

    place: tuple[int, int, int]
    shape: Choice
    seat: Seat
    effort: int
    estimate: Estimate
    quality: float | None

    @property
    def fits(self) -> bool:
        return self.estimate.fit.verdict == "fits"

    def value(self, objective: str) -> float:
        found = self.estimate
        if objective == "cost":
            price = found.cost.usd_per_million_tokens
            return inf if price is None else shown(price)
        if objective == "time":
            speed = found.time.tokens_per_second
            return inf if speed is None else shown(1 / speed)
        if objective == "quality":
            return inf if self.quality is None else -self.quality
        if objective == "headroom":
            return round((found.memory.peak_bytes - (found.fit.usable_bytes or 0)) / 2**30, 2)
        return self.effort

    def key(self, order: tuple[str, ...]) -> tuple[Any, ...]:
        return (*(self.value(name) for name in order), self.effort, self.place)


def everything(space: Space) -> list[Known]:
    """The answer of `estimate` for every candidate that it takes."""
    qualities = {c.place: c.quality.accuracy for c in weigh(space).candidates}
    found = []
    axes = (enumerate(space.shapes), enumerate(space.seats), enumerate(space.optimizers))
    for (i, shape), (j, seat), (k, optimizer) in product(*axes):
        if space.grad_accum(shape, seat) is None:
            continue
        try:
            answer = estimate(space.candidate(shape, seat, optimizer))
        except RequestError:
            assert (i, j, k) not in qualities
            continue
        effort = shape.effort + seat.effort + optimizer.effort
        found.append(Known((i, j, k), shape, seat, effort, answer, qualities[i, j, k]))
    assert len(found) == len(qualities)
    return found


def space_of(fields: dict[str, Any]) -> tuple[Space, Goal]:
    job, goal = asked(None, fields)
    return make_space(job, goal), goal


def allowed(known: Known, goal: Goal) -> bool:
    total = known.estimate.cost.usd_total
    return goal.max_usd is None or (total is not None and total <= goal.max_usd)


def kind(known: Known) -> tuple[Any, ...]:
    job = known.shape.update
    return known.seat.gpu.name, known.seat.gpus, job["method"], job.get("format")


def same(entries: tuple[Entry, ...], known: list[Known]) -> None:
    assert [entry.job for entry in entries] == [one.estimate.job for one in known]
    for entry, one in zip(entries, known, strict=True):
        found = one.estimate
        assert entry.peak_bytes == found.memory.peak_bytes
        assert entry.device_bytes == found.memory.device_bytes
        assert entry.headroom_bytes == found.fit.headroom_bytes
        assert entry.tokens_per_second == found.time.tokens_per_second
        assert entry.usd_per_million_tokens == found.cost.usd_per_million_tokens
        assert entry.usd_total == found.cost.usd_total
        assert (entry.effort, entry.quality) == (one.effort, one.quality)


def dominates(a: Known, b: Known) -> bool:
    axes = ("cost", "time", "headroom", "quality")
    return all(a.value(name) <= b.value(name) for name in axes) and any(a.value(name) < b.value(name) for name in axes)


# -- equal to brute force ---------------------------------------------------------------------------


@LAW
@given(questions())
def test_the_ranking_and_the_front_are_those_of_brute_force(fields: dict[str, Any]) -> None:
    space, goal = space_of(fields)
    every, answer = everything(space), plan(**fields)
    fitting = sorted((one for one in every if one.fits and allowed(one, goal)), key=lambda one: one.key(goal.order))
    firsts: dict[Any, Known] = {}
    for one in fitting:
        firsts.setdefault(kind(one), one)
    same(answer.ranking, list(firsts.values())[: goal.most])
    assert answer.best == (answer.ranking[0] if fitting else None)
    assert (answer.closest is None) == bool(fitting)
    axes = ("cost", "time", "headroom", "quality")
    front: dict[Any, Known] = {}
    for one in fitting:
        if not any(dominates(other, one) for other in fitting):
            front.setdefault(tuple(one.value(name) for name in axes), one)
    same(answer.front, [front[key] for key in sorted(front)])
    counts = answer.counts
    assert counts.candidates == len(every)
    assert counts.too_large <= sum(not one.fits for one in every)


@LAW
@given(questions())
def test_figures_are_those_of_estimate(fields: dict[str, Any]) -> None:
    space, _ = space_of(fields)
    known = {one.place: one for one in everything(space)}
    for c in weigh(space).candidates:
        found = known[c.place].estimate
        assert c.figures.peak_bytes == found.memory.peak_bytes
        assert c.figures.usd_per_hour == found.cost.usd_per_hour
        if c.may_fit:
            assert c.figures.tokens_per_second == found.time.tokens_per_second
        else:
            assert found.fit.verdict != "fits"


@LAW
@given(questions())
def test_where_nothing_fits_the_closest_lacks_least(fields: dict[str, Any]) -> None:
    big = {**fields, "seq_len": 4096, "gpu": "t4,rtx-3060", "micro_batch": 16, "grad_accum": 1}
    big.pop("global_batch")
    space, _ = space_of(big)
    every, answer = everything(space), plan(**big)
    if any(one.fits for one in every):
        return
    lacks = {one.place: _lacks(one) for one in every}
    assert answer.closest is not None
    (miss,) = answer.closest.misses
    assert (miss.what, miss.by) == ("memory", min(lacks.values()))
    for notch in answer.closest.helps:
        assert notch.entry is not None
        assert estimate(notch.entry.job).fit.verdict == "fits"


def _lacks(one: Known) -> int:
    fit = one.estimate.fit
    return int((one.estimate.memory.device_bytes or 0) * (1 + (fit.margin or 0.0))) - (fit.usable_bytes or 0)


# -- laws -------------------------------------------------------------------------------------------


def order_of(answer: Plan) -> tuple[float, ...]:
    """The winner's objectives, the first that decides first."""
    if answer.best is None:
        return (inf,)
    best = answer.best
    values: dict[str, float] = {
        "cost": inf if best.usd_per_million_tokens is None else shown(best.usd_per_million_tokens),
        "time": inf if best.tokens_per_second is None else shown(1 / best.tokens_per_second),
        "quality": inf if best.quality is None else -best.quality,
        "simplicity": best.effort,
    }
    return tuple(values[name] for name in answer.order if name in values)


@LAW
@given(questions(), st.sampled_from(CARDS), st.sampled_from((2, 3)))
def test_more_gpus_never_make_the_best_worse(fields: dict[str, Any], card: str, count: int) -> None:
    fields = {**fields, "objectives": "cost"}
    one = order_of(plan(**fields))
    assert order_of(plan(**{**fields, "gpu": f"{fields['gpu']},{card}"})) <= one
    assert order_of(plan(**{**fields, "gpus": count})) <= one


@LAW
@given(questions())
def test_what_is_recommended_fits(fields: dict[str, Any]) -> None:
    answer = plan(**fields)
    bought = [notch.entry for notch in answer.notches if notch.entry is not None]
    for entry in (*answer.ranking, *answer.front, *bought):
        found = estimate(Job.model_validate_json(entry.job.model_dump_json()))
        assert found.fit.verdict == "fits"
        assert found.memory.device_bytes == entry.device_bytes
    assert plan(**fields) == answer


@LAW
@given(questions())
def test_the_room_is_as_far_as_it_goes(fields: dict[str, Any]) -> None:
    answer = plan(**fields)
    if answer.best is None or answer.room is None:
        return
    job, room = answer.best.job, answer.room
    assert verdict(job, micro_batch=room.micro_batch) == "fits"
    assert verdict(job, micro_batch=room.micro_batch + 1) != "fits" or room.micro_batch >= 4096
    assert verdict(job, seq_len=room.seq_len) == "fits"
    longer = room.seq_len + room.seq_len_step
    assert verdict(job, seq_len=longer) != "fits" or longer > WIDE["max_position_embeddings"]


def verdict(job: Job, **changes: Any) -> str | None:
    return estimate(job.model_copy(update=changes)).fit.verdict


# -- the smallest change ----------------------------------------------------------------------------


START: dict[str, Any] = {
    "model": "mine",
    "config": WIDE,
    "method": "lora",
    "rank": 16,
    "micro_batch": 8,
    "seq_len": 2048,
    "recompute": "none",
    "optimizer": "adamw",
    "gpu": "rtx-4090",
    "grad_accum": 1,
    "attention": "sdpa",
}


@pytest.mark.parametrize(("micro_batch", "gpu"), [(1, "rtx-4090"), (8, "rtx-4090"), (12, "l4")])
def test_nothing_nearer_to_the_start_fits(micro_batch: int, gpu: str) -> None:
    fields = {**START, "micro_batch": micro_batch, "gpu": gpu}
    answer = plan(**fields, aim="smallest_change")
    assert answer.best is not None
    assert answer.best.job.micro_batch * answer.best.job.grad_accum == micro_batch
    space, _ = space_of({**fields, "aim": "smallest_change"})
    nearer = [
        space.candidate(shape, space.seats[0], optimizer)
        for shape, optimizer in product(space.shapes, space.optimizers)
        if shape.effort + optimizer.effort < answer.best.effort
    ]
    assert all(verdict(job) != "fits" for job in nearer)
    assert bool(nearer) == bool(answer.best.changes) == (verdict(Job(**fields)) != "fits")


def test_a_start_that_does_not_fit_gives_up_what_matters_least() -> None:
    answer = plan(**START, aim="smallest_change")
    assert answer.best is not None
    assert {change.field for change in answer.best.changes} == {"micro_batch", "grad_accum"}


def test_a_smallest_change_may_be_another_method() -> None:
    answer = plan(model="llama-7b", method="full", micro_batch=1, seq_len=512, gpu="rtx-4090", aim="smallest_change")
    assert answer.best is not None
    assert answer.best.job.method == "lora"
