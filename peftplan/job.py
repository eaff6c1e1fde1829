"""The question: a Job holds every choice of a fine-tuning run; `None` means the default decides.

Field names are the command line's options with `_` for `-`. A *resolved* job (see `peftplan.resolve`) has every
`None` that can be decided replaced, so that feeding it back gives the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from peftplan.errors import RequestError

Batching = Literal["padded", "packed", "exact"]
Backend = Literal["cuda", "cpu"]
Task = Literal["train", "generate", "serve"]
MOST = 10**9
"""No size of a job is larger: what is, was meant otherwise."""


class Assumption(BaseModel):
    """One default or approximation that moved the answer, or the reason for a null."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    value: Any
    why: str


class Job(BaseModel):
    """One fine-tuning configuration on one cluster. Frozen; unknown fields are refused.

    `settings` carries every knob without an option of its own, under dotted keys: `method.lora_dropout`,
    `format.blocksize`, `optimizer.foreach`, `layout.bucket_bytes`, `model.use_cache`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    model: str
    config: dict[str, Any] | None = None
    """The model's config.json; given, it is used and `model` is only its label."""
    method: str = "lora"
    rank: int | None = Field(default=None, ge=1, le=MOST)
    target_modules: str | tuple[str, ...] | None = None
    settings: dict[str, Any] = Field(default_factory=dict, alias="set")
    format: str | None = None
    dtype: str | None = None
    precision: str | None = None
    adapter_dtype: str = "auto"
    optimizer: str | None = None
    micro_batch: int = Field(default=8, ge=1, le=MOST)
    seq_len: int | None = Field(default=None, ge=1, le=MOST)
    grad_accum: int = Field(default=1, ge=1, le=MOST)
    batching: Batching | None = None
    recompute: str | None = None
    attention: str | None = None
    kernels: str | None = None
    gpu: str | None = None
    gpus: int = Field(default=1, ge=1, le=MOST)
    nodes: int = Field(default=1, ge=1, le=MOST)
    layout: str | None = None
    offload: str | None = None
    task: Task = "train"
    backend: Backend = "cuda"
    tokens: int | None = Field(default=None, ge=1, le=MOST**2)
    """Tokens to train on, for the cost and the energy of the whole run."""
    usd_per_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Price of one GPU; the catalog's median where not given."""

    trainer: str | None = None
    """Whose config this job was read from."""
    extras: dict[str, Any] = Field(default_factory=dict)
    """What that config says besides, by dotted key: not priced, written back as it stands."""
    remarks: tuple[Assumption, ...] = ()
    """What reading it had to assume; repeated in the answer."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise PydanticCustomError("bool", "input should not be true or false")
        return value

    @field_validator("target_modules", mode="before")
    @classmethod
    def _split_targets(cls, value: Any) -> Any:
        if isinstance(value, str) and "," in value:
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return tuple(value) if isinstance(value, list) else value

    def knobs(self, prefix: str) -> dict[str, Any]:
        """The settings under `prefix.`, without the prefix."""
        head = prefix + "."
        return {key[len(head) :]: value for key, value in self.settings.items() if key.startswith(head)}


def make_job(**fields: Any) -> Job:
    """A Job from keyword arguments; every mistake is one RequestError line that names the field."""
    try:
        return Job.model_validate(fields)
    except ValidationError as error:
        raise RequestError(mistakes(error, Job.model_fields)) from None


def mistakes(error: ValidationError, known: Iterable[str]) -> str:
    """Every mistake of a failed validation in one line, each with the option it concerns."""
    return "; ".join(_line(e, known) for e in error.errors())


def _line(error: Any, known: Iterable[str]) -> str:
    field = ".".join(part for part in error["loc"] if isinstance(part, str)) or "job"
    option = "--" + field.replace("_", "-")
    if error["type"] == "extra_forbidden":
        import difflib

        near = difflib.get_close_matches(field, list(known), n=2)
        return f"unknown job field {field!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    if error["type"] == "missing":
        return f"{option} is missing"
    return f"{option}: {_expected(error)}, not {error['input']!r}"


def _expected(error: Any) -> str:
    """What pydantic wanted, as an instruction."""
    kind, limits = error["type"], error.get("ctx", {})
    if kind in ("int_parsing", "int_type", "int_from_float", "int_parsing_size"):
        return "give a whole number"
    if kind in ("float_parsing", "float_type", "finite_number"):
        return "give a number"
    if kind == "greater_than_equal":
        return f"give {limits['ge']} or more"
    if kind == "less_than_equal":
        return f"give at most {limits['le']}"
    if kind == "literal_error":
        return f"give {limits['expected']}"
    return str(error["msg"]).lower()
