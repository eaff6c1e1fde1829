"""What was measured of a setup's quality (`quality.jsonl` beside this file); nothing is guessed.

The rows are test accuracies of PEFT's method comparison: Llama-3.2-3B trained for 5,000 steps of 4 sequences of
MetaMathQA, judged on GSM8K (huggingface/peft, method_comparison/MetaMathQA, 2026-01 to 2026-08; all with bf16 weights,
AdamW, one run per setup, each with a learning rate and scaling of its own). A setup has evidence where method, variant,
rank, targets and every knob that changes the graph are those of a row. It is a prior: another model or task may order
the methods otherwise, and runs of one setup lie up to 0.02 apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from peftplan import methods
from peftplan.errors import RequestError
from peftplan.methods import Method
from peftplan.optimizers import Optimizer
from peftplan.optimizers.adamw import AdamW
from peftplan.plugins import canonical
from peftplan.resolve import Case

_DATA = Path(__file__).with_name("quality.jsonl")
BENCHMARK = "GSM8K after MetaMathQA on Llama-3.2-3B (PEFT's method comparison)"


class Evidence(NamedTuple):
    """A measured accuracy and where it was measured, or None and why there is none."""

    accuracy: float | None
    why: str


class Setup(NamedTuple):
    """What two runs must share to be of one quality."""

    method: Method
    """Without rank and targets."""
    variant: tuple[tuple[str, Any], ...]
    """What the graph does not tell: scaling by the root of the rank, initialisation."""
    rank: int | None
    targets: frozenset[str] | None


class Row(NamedTuple):
    """One measured setup."""

    setup: Setup
    evidence: Evidence


def evidence(case: Case, optimizer: Optimizer) -> Evidence:
    """What was measured of the setup of `case` under `optimizer`."""
    job = case.job
    if case.format.packed:
        return Evidence(None, f"measured with unpacked weights only, not with {job.format}")
    if not isinstance(optimizer, AdamW):
        return Evidence(None, "measured with AdamW only")
    variant = _variant(job.method, job.knobs("method"))
    if variant is None:
        return Evidence(None, f"no accuracy of {job.method} was recorded")
    mine = Setup(_bare(case.method), variant, job.rank, _targets(job.target_modules))
    found = next((row.evidence for row in rows() if row.setup == mine), None)
    return found or Evidence(None, _why(type(case.method)))


_VARIANT = ("use_rslora", "init_lora_weights", "init_weights")


def _variant(name: str, knobs: Mapping[str, Any]) -> tuple[tuple[str, Any], ...] | None:
    """The settings of a method's variant; None where only its name tells it apart (LoRA+'s learning rates)."""
    file, implied = methods.resolve_name(name)
    if not implied and canonical(name) != file:
        return None
    given = {**implied, **knobs}
    usual = {key: given.get(key) in (None, False, key != "use_rslora") for key in _VARIANT}
    return tuple((key, given[key]) for key in _VARIANT if not usual[key])


def _why(method: type[Method]) -> str:
    measured = [row.setup for row in rows() if type(row.setup.method) is method]
    if not measured:
        return "no accuracy of this method was recorded"
    return "measured with other settings: " + ", ".join(sorted(set(map(_words, measured))))


def _words(setup: Setup) -> str:
    rank = f"rank {setup.rank}" if setup.rank is not None else "its own settings"
    return rank + (f" on {', '.join(sorted(setup.targets))}" if setup.targets else "")


@lru_cache(maxsize=1)
def rows() -> Sequence[Row]:
    """The measured setups whose method is modelled with the settings it was measured with, newest first."""
    with _DATA.open(encoding="utf-8") as lines:
        data = sorted((json.loads(line) for line in lines), key=lambda row: str(row["date"]), reverse=True)
    return tuple(row for row in map(_row, data) if row is not None)


def _row(data: dict[str, Any]) -> Row | None:
    knobs = {key.removeprefix("method."): value for key, value in data["set"].items()}
    try:
        method, variant = methods.make(data["method"], knobs), _variant(data["method"], knobs)
    except RequestError:
        return None
    if variant is None:
        return None
    why = f"{BENCHMARK}, {data['date']}: {data['source']}"
    setup = Setup(_bare(method), variant, data["rank"], _targets(data["target_modules"]))
    return Row(setup, Evidence(data["accuracy"], why))


def _bare(method: Method) -> Method:
    """`method` with its class's own rank and targets."""
    own = {f.name: f.default for f in fields(method) if f.name in ("r", "target_modules")}
    return replace(method, **own)


def _targets(names: str | Iterable[str] | None) -> frozenset[str] | None:
    if names is None:
        return None
    return frozenset([names] if isinstance(names, str) else names)
