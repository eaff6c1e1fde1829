"""plan(): constraints in, ranked configurations out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from peftplan.errors import RequestError
from peftplan.job import Assumption, Job
from peftplan.pipeline import VERSION
from peftplan.planner import explore, rank
from peftplan.planner.bench import Bench
from peftplan.planner.closest import closest
from peftplan.planner.desk import Candidate, Weighed, weigh
from peftplan.planner.goal import Goal, asked, check
from peftplan.planner.nearest import near
from peftplan.planner.quality import BENCHMARK
from peftplan.planner.result import Counts, Entry, Plan
from peftplan.planner.space import Space, make_space


def plan(job: Job | None = None, **fields: Any) -> Plan:
    """The best configurations that keep to the limits, why the rest lost, and what a little more or less would buy.

    Takes a Job or its fields, and the limits and preferences of `Goal`: `plan(model="llama-7b", gpu="rtx-4090,l40s",
    tokens=10**8, max_usd=20)`. What the job gives is fixed, the rest is chosen; `gpu` may be a list, and no GPU means
    every common card with a price. `aim="smallest_change"` starts from a complete job instead and changes as little
    as makes it fit. Every recommended configuration has the verdict `fits` in `estimate`; where nothing does, `best`
    is None and `closest` says by how much. Raises RequestError where the request is wrong.
    """
    job, goal = asked(job, fields)
    check(job, goal)
    bench, space = Bench(job), make_space(job, goal)
    if goal.aim == "smallest_change":
        space = near(space, lambda c: rank.within(c, goal, job.tokens) and bench.fits(c)) or space
    weighed = weigh(space)
    if not weighed.candidates:
        raise RequestError(_refusal(weighed, space))
    allowed = [c for c in weighed.candidates if c.may_fit and rank.within(c, goal, job.tokens)]
    ordered = rank.ranked(allowed, goal.order)
    winners = explore.best_of_each_kind(ordered, bench.fits, kind=explore.kind_of(goal), most=goal.most)
    best = winners[0] if winners else None
    return Plan(
        version=VERSION,
        job=job,
        goal=goal,
        order=goal.order,
        global_batch=space.global_batch,
        counts=_counts(weighed, allowed),
        refusals=dict(weighed.refused.most_common()),
        best=bench.entry(best) if best else None,
        estimate=bench.estimate(best) if best else None,
        ranking=_entries(winners, winners, goal, bench),
        front=_entries(rank.front(ordered, bench.fits), winners, goal, bench),
        notches=tuple(explore.notches(best, goal, bench)) if best else (),
        room=explore.room(bench.estimate(best)) if best else None,
        closest=None if best else closest(weighed.candidates, goal, bench),
        assumptions=(*space.assumptions, *_assumptions(space)),
    )


def _entries(chosen: Iterable[Candidate], winners: Sequence[Candidate], goal: Goal, bench: Bench) -> tuple[Entry, ...]:
    return tuple(bench.compared(c, winners[0], goal.order) for c in chosen)


def _refusal(weighed: Weighed, space: Space) -> str:
    """Why there is no candidate at all."""
    if weighed.refused:
        return next(iter(weighed.refused))
    return f"--global-batch {space.global_batch}: no micro-batch and accumulation that the job allows make it up"


def _counts(weighed: Weighed, allowed: Sequence[Candidate]) -> Counts:
    hopeful = sum(c.may_fit for c in weighed.candidates)
    return Counts(
        candidates=len(weighed.candidates),
        refused=weighed.refused.total(),
        too_large=len(weighed.candidates) - hopeful,
        beyond_limits=hopeful - len(allowed),
    )


def _assumptions(space: Space) -> Iterator[Assumption]:
    yield Assumption(what="global_batch", value=space.global_batch, why="sequences per optimizer step, kept for all")
    yield Assumption(what="quality", value=BENCHMARK, why="a prior: other models and tasks may order methods otherwise")
