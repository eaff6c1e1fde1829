"""Write peftplan/calibration.jsonl: what verdicts are calibrated on, from the records beside this file.

python profiles/calibrate.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from peftplan import formats
from peftplan.accuracy import compare, remembered
from peftplan.calibration import DATA, Seen, lines
from peftplan.pipeline import estimate
from peftplan.records import load
from peftplan.result import Estimate

ROOT = Path(__file__).parent
HELD = ("device", "reserved_peak")
"""The kinds of memory that a card must hold, the fuller first."""


def rows() -> Iterator[Seen]:
    """One row for each judged record of one GPU that read what its card had to hold: what libraries hold beside several
    is known too little to widen every verdict by."""
    predict = remembered(estimate)
    for record in load(ROOT):
        if record.job.get("gpus", 1) > 1:
            continue
        judged = {row.kind: row for row in compare([record], predict, every_value=True) if row.predicted_bytes}
        kind = next((kind for kind in HELD if kind in judged), None)
        if kind is not None:
            row = judged[kind]
            yield Seen(
                record.id,
                record.campaign,
                _packed(predict(record.to_job())),
                row.measured_bytes,
                row.predicted_bytes or 0,
            )


def _packed(answer: Estimate) -> bool:
    name = answer.job.format
    return name is not None and formats.make(name, {}).packed


if __name__ == "__main__":
    DATA.write_text(lines(rows()), encoding="utf-8")
