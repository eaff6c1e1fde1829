"""What a plan must keep to and what it prefers: limits, and the order of objectives."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from peftplan.errors import RequestError
from peftplan.job import MOST, Job, make_job, mistakes

Objective = Literal["cost", "time", "quality", "headroom", "simplicity"]
Aim = Literal["best", "smallest_change"]
ORDER: tuple[Objective, ...] = ("cost", "time", "quality", "simplicity")
"""Dollars first, then seconds: among configurations that all fit, those are what a choice costs its owner."""
CHANGE_ORDER: tuple[Objective, ...] = ("simplicity", "cost", "time", "quality")


class Goal(BaseModel):
    """Limits and preferences of a plan. Frozen; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_usd: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Dollars for the whole run of `tokens`."""
    max_hours: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Hours for the whole run of `tokens`, at the expected speed."""
    min_seq_len: int | None = Field(default=None, ge=1, le=MOST)
    methods: tuple[str, ...] | None = None
    """Methods allowed; the job's own where it names one, else the planner's choice."""
    min_rank: int | None = Field(default=None, ge=1, le=MOST)
    """Floor of the rank, for methods that have one."""
    min_quality: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """Floor of the measured accuracy; what nobody measured is left out."""
    global_batch: int | None = Field(default=None, ge=1, le=MOST)
    """Sequences per optimizer step, all GPUs together: the same for every candidate."""
    objectives: tuple[Objective, ...] | None = None
    """Compared in this order, the first difference decides; `order` fills in the default."""
    aim: Aim = "best"
    """`best`: fields that the job gives are fixed, the rest is chosen. `smallest_change`: every choice may
    change, and the configuration nearest to the job wins; the default for a job read from a trainer's config."""
    most: int = Field(default=8, ge=1, le=1000)
    """Rows of the ranking."""

    @field_validator("methods", "objectives", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("methods", "objectives")
    @classmethod
    def _once(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (not value or len(set(value)) < len(value)):
            raise PydanticCustomError("once", "input should name at least one, each once")
        return value

    @property
    def order(self) -> tuple[Objective, ...]:
        """The objectives, those that were not named after those that were."""
        default = ORDER if self.aim == "best" else CHANGE_ORDER
        given = self.objectives or ()
        return (*given, *(name for name in default if name not in given))


def asked(job: Job | None, fields: dict[str, Any]) -> tuple[Job, Goal]:
    """The job and the goal that `plan(job, **fields)` names. Raises RequestError."""
    mine = {name: value for name, value in fields.items() if name in Goal.model_fields}
    rest = {name: value for name, value in fields.items() if name not in mine}
    if job is not None and rest:
        raise RequestError(f"plan() takes a Job or its fields, not both; put {', '.join(rest)} into the Job")
    wanted = job if job is not None else make_job(**rest)
    aim: Aim = "best" if wanted.trainer is None else "smallest_change"
    return wanted, make_goal({"aim": aim, **mine})


def make_goal(fields: dict[str, Any]) -> Goal:
    """A Goal; every mistake is one RequestError line that names the field."""
    try:
        return Goal.model_validate(fields)
    except ValidationError as error:
        raise RequestError(mistakes(error, Goal.model_fields)) from None


def check(job: Job, goal: Goal) -> None:
    """Limits that need what the job does not say are refused."""
    for name in ("max_usd", "max_hours"):
        if getattr(goal, name) is not None and job.tokens is None:
            raise RequestError(f"--{name.replace('_', '-')} needs how much to train on; give --tokens")
    if goal.min_seq_len is not None and job.seq_len is not None and job.seq_len < goal.min_seq_len:
        raise RequestError(f"--seq-len {job.seq_len} is below --min-seq-len {goal.min_seq_len}; leave one out")
    if goal.min_rank is not None and job.rank is not None and job.rank < goal.min_rank:
        raise RequestError(f"--rank {job.rank} is below --min-rank {goal.min_rank}; leave one out")
    if job.task != "train":
        raise RequestError(f"--task {job.task}: a plan is for training; leave it out")
    if job.backend != "cuda":
        raise RequestError(f"--backend {job.backend}: a plan is for GPUs; leave it out")
