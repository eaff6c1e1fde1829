"""Predicted against measured, record by record, each number with the kind of memory it counts.

`peftplan accuracy` prints it (`report/accuracy_text.py` says how).
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from peftplan.errors import PeftplanError
from peftplan.job import Job
from peftplan.records import Measured, Record
from peftplan.result import Estimate

Predict = Callable[[Job], Estimate]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured value beside its prediction; `predicted_bytes` is None where `note` says why."""

    id: str
    kind: str
    measured_bytes: int
    predicted_bytes: int | None
    note: str = ""
    source: str = ""
    """Who measured it."""
    gpu: str = ""
    method: str = ""
    format: str = ""
    layout: str = "none"
    why_off: str = ""

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured: negative means the prediction is under."""
        if self.predicted_bytes is None:
            return None
        return self.predicted_bytes / self.measured_bytes - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Of the judged rows; all errors are fractions."""

    rows: int
    judged: int
    median_abs: float | None
    p90_abs: float | None
    """Nine in ten absolute errors are at most this."""
    worst_under: float | None
    worst_over: float | None
    under_5_percent: int


def compare(records: Iterable[Record], predict: Predict, *, every_value: bool = False) -> list[Row]:
    """Each record's first measured value (or every value) beside `predict` of its job."""
    once = remembered(predict)
    rows: list[Row] = []
    for record in records:
        values = record.measured if every_value else record.measured[:1]
        rows += _record_rows(record, values, once)
    return rows


def remembered(predict: Predict) -> Predict:
    """`predict` with every answer kept, for as long as the caller keeps this: a replay takes a while."""
    seen: dict[str, Estimate] = {}

    def once(job: Job) -> Estimate:
        key = job.model_dump_json()
        if key not in seen:
            seen[key] = predict(job)
        return seen[key]

    return once


def _record_rows(record: Record, values: Iterable[Measured], predict: Predict) -> list[Row]:
    if record.gaps:
        return [_row(record, value, None, "not modelled: " + "; ".join(record.gaps)) for value in values]
    try:
        estimate = predict(record.to_job())
    except PeftplanError as error:
        return [_row(record, value, None, f"refused: {error}") for value in values]
    return [_judge(record, value, estimate) for value in values]


def _judge(record: Record, value: Measured, estimate: Estimate) -> Row:
    predicted = predicted_bytes(estimate, value)
    note = "the estimate leaves this open" if predicted is None else value.beyond_model_why or ""
    job = estimate.job
    row = _row(record, value, predicted, note)
    return replace(row, method=job.method, format=job.format or job.dtype or "", layout=job.layout or "none")


def _row(record: Record, value: Measured, predicted: int | None, note: str) -> Row:
    return Row(
        id=record.id,
        kind=value.kind,
        measured_bytes=value.bytes,
        predicted_bytes=predicted,
        note=note,
        source=_publisher(record.source),
        gpu=record.gpu,
        method=str(record.job.get("method", "")),
        why_off=value.why_off or "",
    )


def _publisher(source: str) -> str:
    """The repository or package that a record's source names."""
    found = re.search(r"github\.com/([^/]+/[^/]+)", source)
    return found[1] if found else source.split(":")[0].removeprefix("PyPI ").removesuffix(" sdist")


def predicted_bytes(estimate: Estimate, value: Measured) -> int | None:
    """The field of `estimate` that counts what `value` counts, plus what no job describes."""
    memory, phases = estimate.memory, estimate.memory.phases
    forward = max(phases.get("forward", 0), phases.get("loss", 0))
    found = {
        "allocated_peak": memory.peak_bytes,
        "reserved_peak": memory.reserved_bytes,
        "device": memory.device_bytes,
        "allocated_resident": estimate.parameters.stored_bytes,
        "allocated_between_steps": memory.static_bytes,
        "allocated_peak_forward": forward or None,
        "allocated_peak_backward": phases.get("backward"),
        "allocated_peak_optimizer": phases.get("optimizer"),
        "allocated_peak_load": phases.get("load"),
        "allocated_peak_loss": phases.get("loss"),
    }[value.kind]
    return None if found is None else found + value.beyond_model_bytes


def summarize(rows: Iterable[Row]) -> Summary:
    """Median and extremes of the errors of `rows`."""
    rows = list(rows)
    errors = [row.error for row in rows if row.error is not None]
    return Summary(
        rows=len(rows),
        judged=len(errors),
        median_abs=statistics.median(map(abs, errors)) if errors else None,
        p90_abs=_p90(list(map(abs, errors))) if errors else None,
        worst_under=min(errors) if errors else None,
        worst_over=max(errors) if errors else None,
        under_5_percent=sum(error < -0.05 for error in errors),
    )


def _p90(values: list[float]) -> float:
    """The smallest value that nine in ten do not exceed."""
    return sorted(values)[math.ceil(0.9 * len(values)) - 1]


GROUPS = ("kind", "method", "format", "layout", "gpu", "source")
"""What rows can be told apart by."""


def grouped(rows: Iterable[Row], by: str) -> dict[str, list[Row]]:
    """The rows by one of GROUPS, most rows first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(getattr(row, by), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdicts:
    """What was said of runs whose card is known, against what became of them."""

    ran: int
    ran_but_does_not_fit: tuple[str, ...]
    out_of_memory: int
    out_of_memory_but_fits: tuple[str, ...]
    """False fits: ids of records."""


def verdicts(records: Iterable[Record], predict: Predict) -> Verdicts:
    """Every record with a card and a verdict, by what became of it."""
    judged = [(record, verdict) for record in records if (verdict := _verdict(record, predict)) is not None]
    failed = [(record, verdict) for record, verdict in judged if record.out_of_memory]
    ran = [(record, verdict) for record, verdict in judged if not record.out_of_memory]
    return Verdicts(
        ran=len(ran),
        ran_but_does_not_fit=tuple(record.id for record, verdict in ran if verdict == "does_not_fit"),
        out_of_memory=len(failed),
        out_of_memory_but_fits=tuple(record.id for record, verdict in failed if verdict == "fits"),
    )


def _verdict(record: Record, predict: Predict) -> str | None:
    if record.gaps:
        return None
    try:
        return predict(record.to_job()).fit.verdict
    except PeftplanError:
        return None
