"""Time of one `estimate()` call in a warm process, over jobs of 32-layer models that all differ; and of the first look
at its `fit`, which replays the step through the caching allocator. Wall time, and beside it the process's CPU time,
which other work on the machine moves less.

    python benchmarks/warm.py [--calls 400]

No job comes twice, so no cache of answers can help. Exits 1 where the median of `estimate()` is 2 ms or more.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from peftplan import Job, estimate

MODELS = ("llama-7b", "llama-2-7b", "llama-3.1-8b", "mistral-7b-v0.1")
METHODS = ("lora", "qlora", "full")
ALLOWED_SECONDS = 0.002
WARMING = len(MODELS) * len(METHODS)
"""Calls that are not counted."""
T = TypeVar("T")


def jobs() -> Iterator[Job]:
    """Every combination once, in a fixed random order."""
    grid = list(
        itertools.product(MODELS, METHODS, (1, 2, 3, 4, 6, 8), (256, 384, 512, 768, 1024, 1536), ("none", "full"))
    )
    random.Random(0).shuffle(grid)
    for model, method, micro_batch, seq_len, recompute in grid:
        yield Job(
            model=model,
            method=method,
            micro_batch=micro_batch,
            seq_len=seq_len,
            recompute=recompute,
            gpu="a100",
        )


class Seconds(NamedTuple):
    wall: float
    cpu: float


def timed(call: Callable[[], T]) -> tuple[T, Seconds]:
    wall, cpu = time.perf_counter(), time.process_time()
    answer = call()
    return answer, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def looked_at(job: Job) -> Seconds:
    """Of the first access to `.fit`."""
    answer = estimate(job)
    fit, taken = timed(lambda: answer.fit)
    assert fit.verdict is not None
    return taken


def spread(taken: Sequence[Seconds]) -> str:
    wall = sorted(t.wall for t in taken)
    median, high = statistics.median(wall), wall[int(0.95 * len(wall))]
    cpu = statistics.median(t.cpu for t in taken)
    return f"median {median * 1e3:6.2f} ms, 95 % under {high * 1e3:6.2f} ms; CPU median {cpu * 1e3:6.2f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=400)
    calls = parser.parse_args().calls
    asked = list(itertools.islice(jobs(), calls))
    estimates = [timed(partial(estimate, job))[1] for job in asked]
    fits = [looked_at(job) for job in asked]
    first, first_fit = estimates[0].wall * 1e3, fits[0].wall * 1e3
    del estimates[:WARMING], fits[:WARMING]
    print(f"{len(estimates)} different jobs")
    print(f"estimate()      {spread(estimates)}")
    print(f"first .fit      {spread(fits)}")
    print(f"the first call of the process: estimate() {first:.1f} ms, .fit {first_fit:.1f} ms")
    return 0 if statistics.median(t.wall for t in estimates) < ALLOWED_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
