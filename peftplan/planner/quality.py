"""What was measured of a setup's quality (`quality.jsonl` beside this file); nothing is guessed.

The rows are test accuracies of PEFT's method comparison: Llama-3.2-3B trained for 5,000 steps of 4 sequences of
MetaMathQA, judged on GSM8K (huggingface/peft, method_comparison/MetaMathQA, 2026-01 to 2026-08; all with bf16 weights,
AdamW, one run per setup, each with a learning rate of its own). A setup has evidence where method, rank, targets and
every other knob are those of a row. It is a prior: another model or task may order the methods otherwise, and runs of
one setup lie up to 0.02 apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from peftplan import methods
from peftplan.errors import RequestError
from peftplan.methods import Method
from peftplan.optimizers import Optimizer
from peftplan.optimizers.adamw import AdamW
from peftplan.resolve import Case

_DATA = Path(__file__).with_name("quality.jsonl")
BENCHMARK = "GSM8K after MetaMathQA on Llama-3.2-3B (PEFT's method comparison)"


class Evidence(NamedTuple):
    """A measured accuracy and where it was measured, or None and why there is none."""

    accuracy: float | None
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured setup. `method` is without rank and targets."""

    method: Method
    rank: int | None
    targets: frozenset[str] | None
    evidence: Evidence


def evidence(case: Case, optimizer: Optimizer) -> Evidence:
    """What was measured of the setup of `case` under `optimizer`."""
    if case.format.packed:
        return Evidence(None, f"measured with unpacked weights only, not with {case.job.format}")
    if not isinstance(optimizer, AdamW):
        return Evidence(None, "measured with AdamW only")
    bare, targets = _bare(case.method), _targets(case.job.target_modules)
    for row in rows():
        if (
            type(row.method) is type(bare)
            and row.method == bare
            and (row.rank, row.targets) == (case.job.rank, targets)
        ):
            return row.evidence
    return Evidence(None, _why(type(bare)))


def _why(method: type[Method]) -> str:
    measured = [row for row in rows() if type(row.method) is method]
    if not measured:
        return "no accuracy of this method was recorded"
    return "measured with other settings: " + ", ".join(sorted({_setup(row) for row in measured}))


def _setup(row: Row) -> str:
    rank = f"rank {row.rank}" if row.rank is not None else "its own settings"
    return rank + (f" on {', '.join(sorted(row.targets))}" if row.targets else "")


@lru_cache(maxsize=1)
def rows() -> Sequence[Row]:
    """The measured setups whose method is modelled with the settings it was measured with."""
    with _DATA.open(encoding="utf-8") as lines:
        made = [_row(json.loads(line)) for line in lines]
    return tuple(row for row in made if row is not None)


def _row(data: dict[str, Any]) -> Row | None:
    knobs = {key.removeprefix("method."): value for key, value in data["set"].items()}
    try:
        method = methods.make(data["method"], knobs)
    except RequestError:
        return None
    why = f"{BENCHMARK}, {data['date']}: {data['source']}"
    return Row(
        method=_bare(method),
        rank=data["rank"],
        targets=_targets(data["target_modules"]),
        evidence=Evidence(data["accuracy"], why),
    )


def _bare(method: Method) -> Method:
    """`method` with its class's own rank and targets."""
    own = {f.name: f.default for f in fields(method) if f.name in ("r", "target_modules")}
    return replace(method, **own)


def _targets(names: str | Iterable[str] | None) -> frozenset[str] | None:
    if names is None:
        return None
    return frozenset([names] if isinstance(names, str) else names)
