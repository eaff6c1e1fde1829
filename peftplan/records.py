"""Measured truth: one Record is one run that somebody made, with the job it ran and the bytes it measured.

Records live as JSON lines under `profiles/`: `published/` (other people's measurements, with their source),
`traced/` (the real model without a GPU) and `cuda/` (our own runs, by `peftplan profile`). Nothing here predicts; see
`accuracy`.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from peftplan.errors import BadFile
from peftplan.job import Job, make_job

SCHEMA: Literal["peftplan.record/1"] = "peftplan.record/1"
MAX_LINE_BYTES = 4 * 2**20
"""A longer line is refused unread: no record comes near it."""

RecordKind = Literal["published", "traced", "cuda"]
MemoryKind = Literal[
    "allocated_peak",
    "reserved_peak",
    "device",
    "allocated_resident",
    "allocated_between_steps",
    "allocated_peak_forward",
    "allocated_peak_backward",
    "allocated_peak_optimizer",
    "allocated_peak_load",
    "allocated_peak_loss",
]
"""What a number counts (never compare across kinds):

- `allocated_peak`: torch's max_memory_allocated over a steady step
- `reserved_peak`: torch's max_memory_reserved, over the whole run unless the record's notes say otherwise
- `device`: reserved plus what the process holds outside the caching allocator (CUDA context, kernels)
- `allocated_resident`: memory_allocated after loading, before the first step
- `allocated_between_steps`: memory_allocated after optimizer.step; where gradients or outputs are still there when
  the harness reads it, they are in `beyond_model_bytes`
- `allocated_peak_forward|backward|optimizer`: the peak within one phase of a steady step; the forward's holds the loss
- `allocated_peak_loss`: of the loss alone
- `allocated_peak_load`: until the model with its adapter is on the device
"""


_HOLDS: tuple[MemoryKind, ...] = ("allocated_resident", "allocated_peak", "reserved_peak", "device")
"""Each is held by the next."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Measured(_Frozen):
    """One measured value, in bytes."""

    kind: MemoryKind
    bytes: int = Field(gt=0)
    half_digit_bytes: int = Field(default=0, ge=0)
    """Half of the last digit that the source prints: errors below it mean nothing."""
    beyond_model_bytes: int = 0
    """Known bytes that no job describes, such as what the harness keeps; added to the prediction."""
    beyond_model_why: str | None = None
    why_off: str | None = None
    """What else moves this value, where a prediction of it is known to be off."""

    @model_validator(mode="after")
    def _explained(self) -> Measured:
        if self.beyond_model_bytes and not self.beyond_model_why:
            raise ValueError("beyond_model_bytes needs beyond_model_why")
        return self


class Run(_Frozen):
    """How a run of `peftplan profile` went, beyond its memory."""

    asked: str = ""
    """Fingerprint of the request: the job as it was stated, the device and the limit."""
    warm_up_steps: int = Field(ge=0)
    step_seconds: tuple[float, ...] = ()
    """Each measured optimizer step with all its micro-batches, by CUDA events (on the CPU by the wall clock)."""
    before_loss_bytes: int | None = None
    """Peak of the forward up to the loss."""
    outside_bytes: int | None = None
    """Device bytes that the caching allocator does not hold: context, kernels, libraries."""
    outside_read: str = ""
    """How they were read."""
    requested_bytes: int | None = None
    """Peak of what tensors asked for, before any rounding (torch's requested_bytes)."""
    retries: int | None = None
    """How often cached memory had to be given back (num_alloc_retries)."""
    settings: str = ""
    """PYTORCH_CUDA_ALLOC_CONF as the run had it."""
    limit_bytes: int | None = None
    """What the process was allowed at most, where less than the card has."""
    failed_in: str | None = None
    """The phase that ran out of memory."""
    driver: str = ""
    cuda: str = ""
    sm_clock_mhz: int | None = None
    """While steps ran, as the next three."""
    memory_clock_mhz: int | None = None
    power_watts: float | None = None
    temperature_celsius: int | None = None


class Record(_Frozen):
    """One run: what was asked (`job`), what came out (`measured`, the value it is judged by first)."""

    schema_: Literal["peftplan.record/1"] = Field(default=SCHEMA, alias="schema")
    id: str = Field(min_length=1, max_length=200)
    kind: RecordKind
    source: str
    source_rev: str
    date: str
    """Of the measurement, as precisely as the source states it (ISO 8601, possibly only year and month)."""
    campaign: str = ""
    """Runs made with one set of machines and versions, which err alike."""
    gpu: str
    job: dict[str, Any]
    out_of_memory: bool = False
    """Whether the run failed for want of memory; it then may have measured nothing."""
    measured: tuple[Measured, ...] = ()
    setup_known: Literal["full", "partial"]
    gaps: tuple[str, ...] = ()
    """What the run needs and no Job can say yet; such a record is shown but not judged."""
    same_setup_as: str | None = None
    """The record this one repeats: same job, run again."""
    trainable_params: int | None = None
    notes: str = ""
    versions: str = ""
    run: Run | None = None
    """Of our own runs."""

    @model_validator(mode="after")
    def _says_something(self) -> Record:
        if not self.measured and not self.out_of_memory:
            raise ValueError("a run that did not run out of memory must have measured something")
        return self

    @model_validator(mode="after")
    def _in_order(self) -> Record:
        """A card holds what the allocator reserved, which holds what was allocated: else a value has a wrong label."""
        most = [(kind, max((v.bytes for v in self.measured if v.kind == kind), default=None)) for kind in _HOLDS]
        known = [(kind, value) for kind, value in most if value is not None]
        for (less, small), (more, large) in itertools.pairwise(known):
            if small > large:
                raise ValueError(f"{less} of {small} bytes is more than {more} of {large}: is one of them mislabelled?")
        return self

    def to_job(self) -> Job:
        """The run's Job. Raises RequestError when `job` is not one."""
        return make_job(**self.job)

    def to_line(self) -> str:
        return self.model_dump_json(by_alias=True, exclude_defaults=False, exclude_none=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a folder held: the sound records, and one line for everything that was not."""

    records: tuple[Record, ...]
    problems: tuple[str, ...] = field(default=())

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


def load(folder: Path | str) -> Loaded:
    """Every record in the `*.jsonl` files under `folder`, in the order of path and line.

    A line that is not a record, belongs to a newer schema, or repeats an id becomes a problem that names
    file and line; the rest still loads. Raises BadFile only when `folder` is no folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise BadFile(f"{root} is not a folder of records")
    records: dict[str, Record] = {}
    problems: list[str] = []
    for path in sorted(root.rglob("*.jsonl")):
        for where, line in _lines(path, problems):
            _take(line, where=where, records=records, problems=problems)
    return Loaded(records=tuple(records.values()), problems=tuple(problems))


def _lines(path: Path, problems: list[str]) -> Iterator[tuple[str, str]]:
    """(place, text) of each non-empty line; an unreadable file is one problem."""
    try:
        text = path.read_bytes()
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
        return
    for number, raw in enumerate(text.split(b"\n"), start=1):
        where = f"{path}:{number}"
        if len(raw) > MAX_LINE_BYTES:
            problems.append(f"{where}: line of {len(raw)} bytes, more than any record has")
        elif raw.strip():
            yield where, raw.decode("utf-8", errors="replace")


def _take(line: str, *, where: str, records: dict[str, Record], problems: list[str]) -> None:
    try:
        record = parse(line)
    except BadFile as error:
        problems.append(f"{where}: {error}")
        return
    if record.id in records:
        problems.append(f"{where}: id {record.id!r} was already taken; this line is left out")
        return
    records[record.id] = record


def parse(line: str) -> Record:
    """The Record that one JSON line states. Raises BadFile, in one line, when it states none."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise BadFile("not JSON (cut off or corrupt)") from None
    if not isinstance(data, dict):
        raise BadFile("not a record: a JSON object is expected")
    if data.get("schema") != SCHEMA:
        raise BadFile(_schema_problem(data.get("schema")))
    try:
        return Record.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "record"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise BadFile(f"record {data.get('id')!r}: {place}: {first['msg'].lower()}{more}") from None


def _schema_problem(schema: object) -> str:
    if isinstance(schema, str) and schema.startswith("peftplan.record/"):
        return f"schema {schema} is newer than this peftplan reads ({SCHEMA}); update peftplan"
    return f"schema {schema!r} is not {SCHEMA}"


def save(path: Path | str, records: Iterable[Record]) -> None:
    """Write `records` to `path` as JSON lines, all or nothing: a reader sees the old file or the new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as out:
            out.writelines(record.to_line() + "\n" for record in records)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def add(path: Path | str, record: Record) -> tuple[str, ...]:
    """Puts `record` into the file of records `path`, in place of the one with its id; all or nothing.

    Returns what was wrong with the file: lines that are no records go, as they are, into `path` + `.rejected`.
    Raises BadFile where it cannot be written.
    """
    target = Path(path)
    kept: dict[str, Record] = {}
    problems: list[str] = []
    refused: list[bytes] = []
    try:
        if target.exists():
            for number, raw in enumerate(target.read_bytes().split(b"\n"), start=1):
                if raw.strip() and not _sound(raw, f"{target}:{number}", kept, problems):
                    refused.append(raw)
        if refused:
            with target.with_name(target.name + ".rejected").open("ab") as aside:
                aside.write(b"\n".join(refused) + b"\n")
        kept[record.id] = record
        save(target, kept.values())
    except OSError as error:
        raise BadFile(f"{target}: {error.strerror or error}") from None
    return tuple(problems)


def _sound(raw: bytes, where: str, kept: dict[str, Record], problems: list[str]) -> bool:
    before = len(problems)
    _take(raw.decode("utf-8", errors="replace"), where=where, records=kept, problems=problems)
    return len(problems) == before
