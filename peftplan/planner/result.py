"""The answer of `plan`: frozen, and its JSON (schema `peftplan.plan/1`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from peftplan.job import Assumption, Job
from peftplan.planner.goal import Goal, Objective
from peftplan.result import Estimate, Verdict


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)


class Change(_Frozen):
    """One field of the resolved job that differs from what was asked for."""

    field: str
    before: Any
    after: Any


class Entry(_Frozen):
    """One configuration: its resolved job and the numbers that `estimate` gives for it."""

    job: Job
    gpu: str
    gpus: int
    """All cards, of all nodes."""
    verdict: Verdict | None
    peak_bytes: int
    device_bytes: int | None
    headroom_bytes: int | None
    """What a process can use of the card, less `device_bytes`."""
    tokens_per_second: float | None
    hours: float | None
    """For the job's `tokens`; null without them."""
    usd_per_hour: float | None
    usd_per_million_tokens: float | None
    usd_total: float | None
    trainable: int
    quality: float | None
    """Measured accuracy of the same setup, between 0 and 1."""
    quality_why: str
    """Where it was measured, or why there is none."""
    effort: int
    """What `simplicity` compares: 0 is the job with every default."""
    changes: tuple[Change, ...] = ()
    lost: str | None = None
    """Why the winner is before it; null for the winner."""


class Notch(_Frozen):
    """One more or one less of something: the best configuration then, and what it buys."""

    change: str
    entry: Entry | None
    says: str
    """The difference to the winner in words, or why there is no such configuration."""


class Room(_Frozen):
    """How far the winner can grow before its verdict is no longer `fits`; nothing else changed."""

    micro_batch: int
    """Fits, and one more does not."""
    seq_len: int
    """Fits, and `seq_len_step` more do not."""
    seq_len_step: int


class Miss(_Frozen):
    """One thing that keeps a configuration from being recommended."""

    what: str
    by: float | None
    """In `unit`; null where the value is unknown."""
    unit: str
    says: str


class Closest(_Frozen):
    """The configuration that misses least, by how much, and the smallest changes that help."""

    entry: Entry
    misses: tuple[Miss, ...]
    helps: tuple[Notch, ...]


class Counts(_Frozen):
    """What became of the candidates."""

    candidates: int
    refused: int
    """Not modelled or impossible."""
    too_large: int
    """Cannot fit whatever the allocator does: peak and context are too much for `fits`."""
    beyond_limits: int
    """May fit, but miss a limit of cost, time or quality."""


class Plan(_Frozen):
    schema_: Literal["peftplan.plan/1"] = Field(default="peftplan.plan/1", alias="schema")
    version: str
    """The version of peftplan's model that answered."""
    job: Job
    """As asked."""
    goal: Goal
    order: tuple[Objective, ...]
    """How configurations that fit were compared."""
    global_batch: int
    counts: Counts
    refusals: dict[str, int]
    """Reasons with the number of candidates each refused."""
    best: Entry | None
    """Null where nothing fits within the limits; `closest` then says what comes nearest."""
    estimate: Estimate | None
    """The whole estimate of the best."""
    ranking: tuple[Entry, ...]
    """The best configuration of each card, count, layout, method and format, best first."""
    front: tuple[Entry, ...]
    """What nothing else that fits beats in cost, time, memory headroom and quality at once."""
    notches: tuple[Notch, ...]
    room: Room | None
    closest: Closest | None
    assumptions: tuple[Assumption, ...]

    def to_json(self, indent: int | None = 2) -> str:
        return self.model_dump_json(indent=indent, by_alias=True)
