"""What PEFT's method comparison says about quality: test accuracy of each setup, its newest run.

The newest, because all runs of one version of the harness compare with each other, and accuracies moved by up to 0.03
between versions (2026-01 to 2026-07: LoRA at rank 64 from 0.481 to 0.474, full fine-tuning from 0.495 to 0.472).
Runs that trained otherwise than the rest (batch, steps, optimizer) are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from importers.common import Row
from importers.metamathqa import record


def rows(runs: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """One row per setup, by name."""
    newest: dict[str, Row] = {}
    for run in sorted(filter(_comparable, runs), key=lambda run: str(run["created_at"])):
        newest[run["experiment_name"]] = run
    yield from (_row(newest[name]) for name in sorted(newest))


def _comparable(run: Row) -> bool:
    train = run["train"]
    usual = (train["optimizer_type"], train["batch_size"], train["max_steps"]) == ("AdamW", 4, 5000)
    return usual and not record(run).gaps


def _row(run: Row) -> dict[str, Any]:
    made = record(run)
    knobs = {key: value for key, value in made.job["set"].items() if key.startswith("method.")}
    return {
        "method": made.job["method"],
        "rank": made.job.get("rank"),
        "target_modules": made.job.get("target_modules"),
        "set": knobs,
        "accuracy": round(run["measured"]["test_accuracy"], 4),
        "date": made.date,
        "gpu": made.gpu,
        "source": made.source,
        "source_rev": made.source_rev,
    }
