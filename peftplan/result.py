"""The answer: what `estimate` returns and `--json` prints (schema `peftplan.estimate/1`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    computed_field,
    model_validator,
)

from peftplan.job import Assumption, Job

T = TypeVar("T")
Verdict = Literal["fits", "tight", "does_not_fit"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)


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


class Held(NamedTuple):
    """What only a replay of the allocator tells."""

    reserved_bytes: int | None
    device_bytes: int | None


class Late(Generic[T]):
    """A value computed when first asked for. Two of them are equal: what they compute follows from the rest."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._known: list[T] = []

    def __call__(self) -> T:
        if not self._known:
            self._known.append(self._compute())
        return self._known[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Late)

    def __reduce__(self) -> tuple[Callable[[T], Late[T]], tuple[T]]:
        return known, (self(),)

    def __hash__(self) -> int:
        return 0


def known(value: T) -> Late[T]:
    """A late value that is there already."""
    return Late(lambda: value)


class Memory(_Frozen):
    """All in bytes; see docs/memory.md for what each one counts.

    `reserved_bytes` and `device_bytes` replay the step through a model of the caching allocator: tens of milliseconds,
    spent when one of them is first read.
    """

    peak_bytes: int
    static_bytes: int
    saved_for_backward_bytes: int
    at_peak: dict[str, int]
    at_peak_phase: str
    phases: dict[str, int]
    kv_cache_bytes: int | None = None
    host_bytes: int | None = None
    """In host memory during a step: activations that wait there for backward, optimizer states that live there."""
    per_rank: tuple[RankMemory, ...] = ()
    _held: Late[Held] = PrivateAttr(default_factory=lambda: Late(lambda: Held(None, None)))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def reserved_bytes(self) -> int | None:
        """What the CUDA caching allocator holds at the peak of a steady step."""
        return self._held().reserved_bytes

    @computed_field  # type: ignore[prop-decorator]
    @property
    def device_bytes(self) -> int | None:
        """Reserved, the CUDA context and what libraries take outside the allocator: what must fit on the card."""
        return self._held().device_bytes

    @model_validator(mode="wrap")
    @classmethod
    def _take_held(cls, data: Any, handler: ModelWrapValidatorHandler[Memory]) -> Memory:
        """A memory section with its late values given, as in an answer read back from JSON."""
        if not isinstance(data, dict) or not data.keys() & {"reserved_bytes", "device_bytes"}:
            return handler(data)
        held = Held(data.get("reserved_bytes"), data.get("device_bytes"))
        made = handler({k: v for k, v in data.items() if k not in ("reserved_bytes", "device_bytes")})
        made._held = Late(lambda: held)
        return made

    def holding(self, held: Late[Held]) -> Memory:
        """This with its late values."""
        made = self.model_copy()
        made._held = held
        return made


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


class Communication(_Frozen):
    """What one rank sends over one kind of link in one kind of collective; `link_seconds` as if nothing else ran."""

    collective: str
    link: str
    ranks: int
    calls: int
    sent_bytes: int
    link_seconds: float


class Time(_Frozen):
    step_seconds: Interval | None
    tokens_per_second: float | None
    mfu: float | None
    breakdown: dict[str, float] | None
    communication: tuple[Communication, ...] = ()
    """By collective and link, of one optimizer step."""


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
    """What the verdict rests on."""
    margin: float | None = None
    """The share of the needed bytes that `fits` asks to be left free: the worst that measured runs were short by."""
    probability: float | None = None
    """That it runs there, by what measured runs used of what was predicted for them."""
    low_bytes: int | None = None
    high_bytes: int | None = None
    """Nine in ten of comparable runs, campaign by campaign, used between these bytes on the device."""

    @staticmethod
    def unknown(gpu: str | None) -> Fit:
        return Fit(gpu=gpu, usable_bytes=None, headroom_bytes=None, verdict=None, confidence=None)


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
    assumptions: tuple[Assumption, ...]
    _fit: Late[Fit] = PrivateAttr(default_factory=lambda: Late(lambda: Fit.unknown(None)))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fit(self) -> Fit:
        """The verdict; reads `memory.device_bytes`, so the first look costs a replay of the allocator."""
        return self._fit()

    @model_validator(mode="wrap")
    @classmethod
    def _take_fit(cls, data: Any, handler: ModelWrapValidatorHandler[Estimate]) -> Estimate:
        if not isinstance(data, dict) or "fit" not in data:
            return handler(data)
        given = Fit.model_validate(data["fit"])
        made = handler({k: v for k, v in data.items() if k != "fit"})
        made._fit = Late(lambda: given)
        return made

    def judged(self, fit: Late[Fit]) -> Estimate:
        """This with its verdict."""
        made = self.model_copy()
        made._fit = fit
        return made

    def reason(self, *names: str) -> str:
        """Why the first of `names` (`time.step_seconds`, `time`) that has a reason is null; else nothing."""
        reasons = {a.what: a.why for a in self.assumptions if a.value is None}
        return next((reasons[name] for name in names if name in reasons), "")

    def to_json(self, indent: int | None = 2) -> str:
        return self.model_dump_json(indent=indent, by_alias=True)
