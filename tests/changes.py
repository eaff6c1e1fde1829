"""Old against new: which predictions changed since another revision, and by how much.

    python -m tests.changes [--base REV] [--markdown] [--rows 40]

Answers a wide grid of jobs (models, methods, sizes, recomputation, attention; every example of every plug-in) with the
code as it was at REV (the last commit unless told) and with the working tree's, each in a process of its own. Prints
every quantity that differs, the largest change first. Exit code 0 whatever changed, 2 for an unknown revision.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftplan.units import format_bytes, format_count
from tests.conformance.checks import KINDS, found

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("changes_worker.py")
MODELS = ("llama-7b", "llama-3.1-8b", "qwen2.5-0.5b", "mistral-7b-v0.1", "gemma-2b")
METHODS = ("full", "lora", "qlora", "dora")
SIZES = ((1, 512), (4, 1024), (2, 4096))
REPLAYED_EVERY = 6
"""Of the jobs of sizes, one in so many is replayed through the allocator (0.1 s)."""

Asked = tuple[dict[str, Any], bool]
"""A job's fields, and whether it is replayed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One quantity of one job that differs; None where a side refuses the job or does not know."""

    job: str
    quantity: str
    before: Any
    after: Any

    @property
    def share(self) -> float | None:
        numbers = all(isinstance(value, (int, float)) for value in (self.before, self.after))
        return self.after / self.before - 1 if numbers and self.before else None


def grid() -> dict[str, Asked]:
    """Every job by its name."""
    return {**_sizes(), **_examples()}


def _sizes() -> dict[str, Asked]:
    jobs: dict[str, Asked] = {}
    choices = itertools.product(MODELS, METHODS, SIZES, ("none", "full"), ("sdpa", "eager"))
    for number, (model, method, (batch, seq), recompute, attention) in enumerate(choices):
        fields = {
            "model": model, "method": method, "micro_batch": batch, "seq_len": seq, "recompute": recompute,
            "attention": attention, "gpu": "h100",
        }  # fmt: skip
        name = f"{model} {method} {batch}x{seq} recompute={recompute} {attention}"
        jobs[name] = (fields, number % REPLAYED_EVERY == 0)
    return jobs


def _examples() -> dict[str, Asked]:
    jobs: dict[str, Asked] = {}
    for kind, folder in KINDS.items():
        for name in folder.names():
            for number, example in enumerate(found(kind, name).examples):
                base = {"model": "qwen2.5-0.5b", "micro_batch": 2, "seq_len": 512, "gpu": "h100"}
                fields = {**base, **({"method": "full"} if kind == "optimizer" else {})}
                asked = found(kind, name).asked(example)
                jobs[f"{kind} {name} example {number}"] = (json.loads(json.dumps({**fields, **asked})), False)
    return jobs


def answers(tree: Path, jobs: Iterable[Asked]) -> list[dict[str, Any]]:
    """What the peftplan in `tree` says. Raises SystemExit where it cannot run at all."""
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        input=json.dumps(list(jobs)),
        capture_output=True,
        text=True,
        cwd=tree,
        env={"PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"error: the peftplan in {tree} does not run: {done.stderr.strip().splitlines()[-1:]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def extract(revision: str, folder: Path) -> None:
    """The package as it was at `revision`. Raises ValueError where git knows no such revision."""
    command = ["git", "archive", "--format=tar", f"{revision}^{{commit}}", "peftplan"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if revision.startswith("-") or done.returncode:
        raise ValueError(f"no peftplan at revision {revision!r} here; a shallow clone lacks its history")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive.getmembers():
            if member.isfile() and not member.name.startswith(("/", "..")):
                archive.extract(member, folder, set_attrs=False)


def compared(names: Iterable[str], before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[Change]:
    """Every difference, the largest share first, what one side refuses before all."""
    changes = [
        Change(job=name, quantity=quantity, before=old.get(quantity), after=new.get(quantity))
        for name, old, new in zip(names, before, after, strict=True)
        for quantity in dict.fromkeys((*old, *new))
        if old.get(quantity) != new.get(quantity) and ("error" not in {**old, **new} or quantity == "error")
    ]
    return sorted(changes, key=lambda c: -abs(c.share) if c.share is not None else float("-inf"))


def text(changes: list[Change], total: int, *, rows: int, markdown: bool = False) -> str:
    """The report."""
    jobs = len({change.job for change in changes})
    head = f"{total} jobs: {total - jobs} are answered as before, {jobs} differ in {len(changes)} quantities"
    cells = [_cells(change) for change in changes[:rows]]
    more = [f"... and {len(changes) - rows} more"] if len(changes) > rows else []
    if not markdown:
        return "\n".join([head, *("  ".join(row) for row in cells), *more])
    table = ["| job | quantity | before | after | change |", "|---|---|---:|---:|---:|"] if cells else []
    return "\n".join(["### Predictions, old against new", "", head, "", *table, *map(_row, cells), *more])


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cells(change: Change) -> tuple[str, str, str, str, str]:
    share = "" if change.share is None else f"{change.share:+.3%}"
    before, after = (_shown(change.quantity, value) for value in (change.before, change.after))
    return change.job, change.quantity, before, after, share


def _shown(quantity: str, value: Any) -> str:
    if value is None:
        return "answered" if quantity == "error" else "unknown"
    if quantity.endswith("_bytes"):
        return format_bytes(value)
    return format_count(value) if isinstance(value, (int, float)) and value >= 1000 else str(value)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.changes", description="Predictions, old against new.")
    parser.add_argument("--base", default="HEAD", help="the revision to compare with")
    parser.add_argument("--markdown", action="store_true", help="print Markdown, for a job's summary")
    parser.add_argument("--rows", type=int, default=40, help="differences shown at most")
    asked = parser.parse_args(arguments)
    jobs = grid()
    with tempfile.TemporaryDirectory() as folder:
        try:
            extract(asked.base, Path(folder))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        before = answers(Path(folder), jobs.values())
    changes = compared(jobs, before, answers(ROOT, jobs.values()))
    print(text(changes, len(jobs), rows=asked.rows, markdown=asked.markdown))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
