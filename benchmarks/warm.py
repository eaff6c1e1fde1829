"""Wall time of one `estimate()` call in a warm process, over jobs of 32-layer models that all differ.

    python benchmarks/warm.py [--calls 500]

No job comes twice, so no cache of answers can help. Exits 1 where the median is 2 ms or more.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterator

from peftplan import Job, estimate

MODELS = ("llama-7b", "llama-2-7b", "llama-3.1-8b", "mistral-7b-v0.1")
METHODS = ("lora", "qlora", "full")
ALLOWED_SECONDS = 0.002


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    calls = parser.parse_args().calls
    taken = []
    for job in itertools.islice(jobs(), calls):
        start = time.perf_counter()
        estimate(job)
        taken.append(time.perf_counter() - start)
    first, warm = taken[0], sorted(taken[len(MODELS) * len(METHODS) :])
    median = statistics.median(warm)
    p95 = warm[int(0.95 * len(warm))]
    print(f"{len(warm)} different jobs: median {median * 1e3:.2f} ms, 95 % under {p95 * 1e3:.2f} ms")
    print(f"the first call of the process: {first * 1e3:.1f} ms")
    return 0 if median < ALLOWED_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
