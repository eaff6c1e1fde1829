"""What a run may take: the limits of a budget, as people write them and as numbers."""

from __future__ import annotations

import difflib
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from peftplan.errors import RequestError
from peftplan.hardware import find_gpu
from peftplan.job import MOST, Job
from peftplan.units import MIB, parse_bytes

OPTIONS = "--"
Accept = Literal["fits", "tight"]


class Growth(NamedTuple):
    """The most a configuration may grow: bytes, or a share of what it took before."""

    bytes: int | None
    share: float | None

    def allowed_bytes(self, base_bytes: int) -> int:
        return self.bytes if self.bytes is not None else int(base_bytes * (self.share or 0.0))


class Limits(BaseModel):
    """Limits of a configuration; None is no limit. Frozen; every value is judged when it is given.

    >>> Limits(max_memory="24GB").max_memory_bytes
    24000000000
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu: str | None = None
    """The card it must fit on; without one, the card that the configuration names, if any."""
    accept: Accept = "tight"
    """The worst verdict that passes on that card."""
    max_memory: str | None = None
    """Of one device, the CUDA context included: "24GB" (10^9), "23.5GiB" (2^30)."""
    max_usd: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of the whole run, at the expected speed."""
    max_hours: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of the whole run, at the expected speed."""
    max_growth: str | None = None
    """Of the memory of one device since the base revision: "500MiB" or "5%"."""
    tokens: int | None = Field(default=None, ge=1, le=MOST**2)
    """Tokens that the run trains on, where the configuration does not say."""
    usd_per_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Price of one GPU, where the configuration does not say; else the catalog's median."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise PydanticCustomError("bool", "input should not be true or false")
        return value

    @field_validator("gpu")
    @classmethod
    def _known_gpu(cls, value: str | None) -> str | None:
        if value is not None:
            _judged(find_gpu, value)
        return value

    @field_validator("max_memory", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        text = str(value) if type(value) is int else value
        if isinstance(text, str) and _judged(parse_bytes, text) < MIB:
            raise PydanticCustomError("limit", "{text} has no unit; write it like 24GB", {"text": text})
        return text

    @field_validator("max_growth", mode="before")
    @classmethod
    def _growth(cls, value: Any) -> Any:
        text = str(value) if type(value) is int else value
        if isinstance(text, str):
            _judged(_growth_of, text)
        return text

    @property
    def max_memory_bytes(self) -> int | None:
        return None if self.max_memory is None else parse_bytes(self.max_memory)

    @property
    def growth(self) -> Growth | None:
        return None if self.max_growth is None else _growth_of(self.max_growth)

    def asked(self, job: Job) -> Job:
        """`job` on the card of these limits, with what it leaves open filled in."""
        known = {"tokens": job.tokens or self.tokens, "gpu": self.gpu or job.gpu}
        price = job.usd_per_hour if job.usd_per_hour is not None else self.usd_per_hour
        return job.model_copy(update={**known, "usd_per_hour": price})

    def any_for(self, job: Job) -> bool:
        """Whether there is anything to hold `job` against."""
        given = (self.max_memory, self.max_usd, self.max_hours, self.max_growth, self.gpu or job.gpu)
        return any(limit is not None for limit in given)


def make_limits(fields: dict[str, Any], *, where: str, beside: tuple[str, ...] = ()) -> Limits:
    """Limits from what a file or (`where` being OPTIONS) the command line says.

    Raises RequestError in one line that begins with `where`. `beside` are the keys that may stand there too, for the
    suggestions.
    """
    try:
        return Limits.model_validate(fields)
    except ValidationError as error:
        raise RequestError("; ".join(_line(e, where, beside) for e in error.errors())) from None


def _line(error: Any, where: str, beside: tuple[str, ...]) -> str:
    key = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        known = (*beside, *Limits.model_fields)
        near = difflib.get_close_matches(key, known, n=2)
        fix = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        return f"{where}unknown key {key!r}; {fix}"
    shown = "--" + key.replace("_", "-") if where == OPTIONS else where + key
    if error["type"] == "limit":
        return f"{shown}: {error['msg']}"
    return f"{shown}: {error['msg'].lower()}, not {error['input']!r}"


def _growth_of(text: str) -> Growth:
    number = text.strip().removesuffix("%")
    if number == text.strip():
        if number.isdigit() and int(number):
            raise RequestError(f"{text!r} says neither bytes nor percent; write it like 5% or 500MiB")
        return Growth(bytes=parse_bytes(text), share=None)
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise RequestError(f"cannot read {text!r} as a growth; write it like 5% or 500MiB")
    return Growth(bytes=None, share=share / 100)


def _judged(judge: Any, text: str) -> Any:
    """`judge(text)`, its RequestError as one that a model can raise."""
    try:
        return judge(text)
    except RequestError as error:
        raise PydanticCustomError("limit", "{text}", {"text": str(error)}) from None
