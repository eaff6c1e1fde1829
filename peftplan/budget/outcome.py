"""What `check` answers (schema `peftplan.check/1`)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from peftplan.job import Assumption
from peftplan.result import Verdict

Limit = Literal["gpu", "max_memory", "max_usd", "max_hours", "max_growth"]
Unit = Literal["bytes", "usd", "hours", "seconds per token"]
Status = Literal["within", "over", "error"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)


class Held(_Frozen):
    """One limit against what the configuration takes."""

    limit: Limit
    stated: str
    """The limit as it was written."""
    status: Status
    """`error` where the quantity cannot be known; `why` says the reason."""
    allowed: float | int | None
    found: float | int | None
    unit: Unit
    why: str = ""


class Lever(_Frozen):
    """A line of a configuration that put it over its budget."""

    file: str
    line: int
    text: str
    change: Literal["changed", "added", "removed", "drives"]
    """Since the base revision; or, without one, the line whose value the broken limit hangs on most."""
    instead: str | None
    """What the line said before, or what was tried in its place."""
    saves: float | int | None
    """How much less the configuration takes with `instead`; None where it was not found to take less."""
    unit: Unit
    """Bytes are those of the peak, before the caching allocator."""


class Judged(_Frozen):
    """One configuration under one budget."""

    budget: str
    config: str
    status: Status
    model: str | None = None
    gpu: str | None = None
    verdict: Verdict | None = None
    device_bytes: int | None = None
    base_device_bytes: int | None = None
    usd_total: float | None = None
    hours: float | None = None
    limits: tuple[Held, ...] = ()
    levers: tuple[Lever, ...] = ()
    unpriced: tuple[Assumption, ...] = ()
    """Keys of a trainer's config that are not priced as written and could move memory."""
    error: str | None = None
    error_code: int | None = None


class Check(_Frozen):
    """Every configuration under its budget, in the order of the budgets and of the files' names."""

    schema_: Literal["peftplan.check/1"] = Field(default="peftplan.check/1", alias="schema")
    version: str
    """The version of peftplan's model that judged."""
    base: str | None
    status: Status
    results: tuple[Judged, ...]

    @property
    def exit_code(self) -> int:
        """0 within, 1 over budget, 2 something could not be judged (3 where only the outside failed)."""
        codes = {result.error_code for result in self.results if result.status == "error"}
        if codes:
            return 3 if codes == {3} else 2
        return int(self.status == "over")


def worst(statuses: list[Status]) -> Status:
    return "error" if "error" in statuses else "over" if "over" in statuses else "within"
