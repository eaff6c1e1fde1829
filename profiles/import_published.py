"""Write profiles/published/*.jsonl from tables of other people's measurements.

    python profiles/import_published.py --metamathqa FILE --published FILE --out profiles/published
    python profiles/import_published.py --metamathqa FILE --quality peftplan/planner/quality.jsonl

Both inputs are JSON lines: the runs of PEFT's MetaMathQA comparison, and a table of published measurements. With
--quality, the accuracies of those runs are written instead of their bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from importers import fitcheck, fms, metamathqa, others, quality, sharded, simumax
from importers.common import read_rows

from peftplan.records import Record, save

FAMILIES = {"fitcheck": fitcheck, "fms": fms, "others": others, "sharded": sharded, "simumax": simumax}


def mark_repeats(records: Iterable[Record]) -> list[Record]:
    """The records in order; one with the job and GPU of an earlier one is marked as its repeat."""
    first: dict[str, str] = {}
    marked = []
    for record in records:
        key = f"{record.gpu} {sorted(record.job.items(), key=lambda item: item[0])} {record.gaps}"
        original = first.setdefault(key, record.id)
        same = None if original == record.id else original
        marked.append(record.model_copy(update={"same_setup_as": same}))
    return marked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metamathqa", type=Path)
    parser.add_argument("--published", type=Path)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path)
    where.add_argument("--quality", type=Path)
    args = parser.parse_args()
    if args.quality is not None:
        lines = [json.dumps(row) for row in quality.rows(read_rows(args.metamathqa))]
        args.quality.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    if args.metamathqa is not None:
        runs = map(metamathqa.record, read_rows(args.metamathqa))
        write(args.out / "metamathqa.jsonl", sorted(runs, key=lambda run: run.id))
    if args.published is not None:
        rows = list(read_rows(args.published))
        for name, family in FAMILIES.items():
            write(args.out / f"{name}.jsonl", [family.record(row) for row in rows if family.wants(row)])


def write(path: Path, records: Iterable[Record]) -> None:
    marked = mark_repeats(records)
    save(path, marked)
    print(f"{path}: {len(marked)} records, {sum(bool(record.gaps) for record in marked)} with gaps")


if __name__ == "__main__":
    main()
