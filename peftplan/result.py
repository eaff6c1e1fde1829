"""The answer: what `estimate` returns and `--json` prints (schema `peftplan.estimate/1`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from peftplan.job import Job

Verdict = Literal["fits", "tight", "does_not_fit"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Parameters(_Frozen):
    """Counts as PEFT counts them (tied weights once; packed weights by their logical size)."""

    total: int
    trainable: int
    stored_bytes: int
    """Bytes of every parameter as stored, quantization constants included."""


class RankMemory(_Frozen):
    """Memory of one distinct rank, where ranks differ."""

    rank: str
    peak_bytes: int
    reserved_bytes: int | None
    device_bytes: int | None
    static_bytes: int


class Memory(_Frozen):
    """All in bytes; see docs/memory.md for what each one counts."""

    peak_bytes: int
    reserved_bytes: int | None
    device_bytes: int | None
    static_bytes: int
    saved_for_backward_bytes: int
    at_peak: dict[str, int]
    at_peak_phase: str
    phases: dict[str, int]
    kv_cache_bytes: int | None = None
    per_rank: tuple[RankMemory, ...] = ()


class Flops(_Frozen):
    """FLOPs of one micro-batch of one replica, 1 MAC = 2."""

    forward: int
    backward: int
    recompute: int
    optimizer: int
    total: int


class Interval(_Frozen):
    low: float
    expected: float
    high: float


class Time(_Frozen):
    step_seconds: Interval | None
    tokens_per_second: float | None
    mfu: float | None
    breakdown: dict[str, float] | None


class Cost(_Frozen):
    usd_per_hour: float | None
    usd_per_million_tokens: float | None
    usd_total: float | None
    energy_kwh: float | None


class Fit(_Frozen):
    gpu: str | None
    usable_bytes: int | None
    headroom_bytes: int | None
    verdict: Verdict | None
    confidence: str | None


class Assumption(_Frozen):
    """One default or approximation that moved the answer, or the reason for a null."""

    what: str
    value: Any
    why: str


class Term(_Frozen):
    """One line of `explain`: where bytes or FLOPs come from."""

    name: str
    bytes: int
    kind: str
    formula: str
    source: str


class Estimate(_Frozen):
    schema_: Literal["peftplan.estimate/1"] = Field(default="peftplan.estimate/1", alias="schema")
    version: str
    """The version of peftplan's model that answered."""
    job: Job
    parameters: Parameters
    memory: Memory
    flops: Flops
    time: Time
    cost: Cost
    fit: Fit
    assumptions: tuple[Assumption, ...]

    def to_json(self, indent: int | None = 2) -> str:
        return self.model_dump_json(indent=indent, by_alias=True)
