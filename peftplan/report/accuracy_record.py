"""One measured run opened: what ran, what was measured and predicted, and the terms of the prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftplan.accuracy import Predict, Row, compare, remembered
from peftplan.breakdown import explain
from peftplan.errors import PeftplanError
from peftplan.pipeline import estimate
from peftplan.records import Record
from peftplan.report import ledger
from peftplan.units import format_bytes


def document(record: Record) -> dict[str, Any]:
    """The same as one JSON object (schema `peftplan.accuracy-record/1`)."""
    rows = compare([record], estimate, every_value=True)
    return {
        "schema": "peftplan.accuracy-record/1",
        "record": record.model_dump(mode="json", by_alias=True),
        "values": [{**asdict(row), "error": row.error} for row in rows],
        "terms": _terms(record),
    }


def _terms(record: Record) -> list[dict[str, Any]] | None:
    """The terms that sum to the predicted peak; None where no job states the run."""
    try:
        return [term.model_dump(mode="json") for term in explain(record.to_job())]
    except PeftplanError:
        return None


def render(record: Record) -> RenderableType:
    """The run, its values beside their predictions, then the ledger of the predicted peak."""
    predict = remembered(estimate)
    return Group(*_about(record), *_values(record, predict), *_ledger(record, predict))


def _about(record: Record) -> Iterator[RenderableType]:
    yield Text(record.id, style="bold")
    yield Text(f"{record.gpu}, {record.date}; {record.source} at {record.source_rev}", style="bright_black")
    for label, text in (("versions", record.versions), ("notes", record.notes), ("repeats", record.same_setup_as)):
        if text:
            yield Text(f"{label}: {text}")
    for gap in record.gaps:
        yield Text(f"not modelled: {gap}")
    if record.out_of_memory:
        yield Text("ran out of memory")


def _values(record: Record, predict: Predict) -> Iterator[RenderableType]:
    rows = compare([record], predict, every_value=True)
    yield _table(rows) if rows else Text("nothing was measured")
    for row in rows:
        if row.why_off:
            yield Text(f"{row.kind}: {row.why_off}")


def _table(rows: Sequence[Row]) -> RenderableType:
    shown = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "right", "right", "left"):
        shown.add_column(justify=justify, overflow="fold")
    shown.add_row()
    shown.add_row(*(Text(head, style="bold") for head in ("memory", "measured", "predicted", "error", "")))
    for row in rows:
        predicted = "" if row.predicted_bytes is None else format_bytes(row.predicted_bytes)
        error = "" if row.error is None else f"{row.error:+.2%}"
        shown.add_row(row.kind, format_bytes(row.measured_bytes), predicted, error, row.note)
    shown.add_row()
    return shown


def _ledger(record: Record, predict: Predict) -> Iterator[RenderableType]:
    try:
        job = record.to_job()
        yield ledger.render(predict(job), explain(job), ())
    except PeftplanError as error:
        yield Text(f"no prediction: {error}")
