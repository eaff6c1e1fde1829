"""CPU time of one plan() over more than 20,000 candidates of a 32-layer model: LoRA and QLoRA at four ranks and two
targets, three weight formats, every micro-batch of a global batch, three optimizers, recomputation, two attention
implementations, on eleven cards.

    python benchmarks/plan.py [--repeat 3]

CPU time of the process, which other work on the machine moves less than wall time; both are printed. A plan is weighing
(peak, speed and price of every candidate), ordering, and the verdicts of those that are looked at. Exits 1 where the
fastest plan takes 5 s of CPU time or more.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from peftplan import plan
from peftplan.planner.desk import weigh
from peftplan.planner.goal import asked
from peftplan.planner.space import make_space

QUESTION: dict[str, Any] = {"model": "llama-3.1-8b", "methods": "lora,qlora", "seq_len": 1024, "global_batch": 16}
ALLOWED_SECONDS = 5.0
T = TypeVar("T")


def timed(what: str, call: Callable[[], T]) -> tuple[T, float]:
    """What `call` returns, and its CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{what:8} {cpu:5.2f} s CPU, {wall:5.2f} s wall")
    return found, cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    seconds = []
    for _ in range(parser.parse_args().repeat):
        timed("weigh()", lambda: weigh(make_space(*asked(None, QUESTION))))
        answer, cpu = timed("plan()", lambda: plan(**QUESTION))
        seconds.append(cpu)
    counts = answer.counts
    print(f"{counts.candidates:,} candidates, {counts.refused:,} refused, {len(answer.front)} on the front")
    print(
        f"fastest plan(): {min(seconds):.2f} s of CPU time, {counts.candidates / min(seconds):,.0f} candidates a second"
    )
    return 0 if min(seconds) < ALLOWED_SECONDS and counts.candidates >= 20_000 else 1


if __name__ == "__main__":
    sys.exit(main())
