"""Wall time of `peftplan check` in a fresh process over fifty configurations that all differ, half job files and half
TRL configs, all within their budget.

    python benchmarks/check.py [--runs 5]

No two ask the same, so every verdict costs an estimate and a replay of the allocator. Exits 1 where the median is
2 s or more.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MODELS = ("llama-7b", "llama-3.1-8b", "mistral-7b-v0.1", "Qwen/Qwen2.5-7B-Instruct", "llama-3.2-1b")
ALLOWED_SECONDS = 2.0
BUDGETS = 'configs = ["configs/*.yaml"]\ngpu = "h200"\nmax-memory = "140GB"\n'


def configs() -> Iterator[tuple[str, str]]:
    """Fifty (file name, text)."""
    grid = itertools.product(MODELS, (1, 2, 3, 4, 5), (512, 1024))
    for number, (model, batch, length) in enumerate(grid):
        lines = _job(model, batch, length) if number % 2 else _trl(model, batch, length)
        yield f"{number:02}.yaml", "\n".join(lines) + "\n"


def _job(model: str, batch: int, length: int) -> list[str]:
    return [f"model: {model}", "method: qlora", "rank: 16", f"micro_batch: {batch}", f"seq_len: {length}"]


def _trl(model: str, batch: int, length: int) -> list[str]:
    stated = [f"model_name_or_path: {model}", f"per_device_train_batch_size: {batch}", f"max_length: {length}"]
    beside = [
        "dataset_name: trl-lib/Capybara",
        "learning_rate: 1.0e-4",
        "logging_steps: 10",
        "output_dir: out",
        "seed: 1",
    ]
    return [*stated, "use_peft: true", "lora_r: 16", *beside]


def run(folder: Path) -> float:
    """Seconds of one `peftplan check`."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "peftplan.cli", "check"], cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode or "50 within budget" not in done.stdout:
        raise SystemExit(done.stdout[-2000:] + done.stderr)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "peftplan.toml").write_text(BUDGETS)
        (folder / "configs").mkdir()
        for file, text in configs():
            (folder / "configs" / file).write_text(text)
        taken = [run(folder) for _ in range(runs)]
    median, used = statistics.median(taken), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (used.ru_utime + used.ru_stime) / runs
    print(f"peftplan check over 50 configurations: median {median:.2f} s, {min(taken):.2f} to {max(taken):.2f} s")
    print(f"CPU seconds of all its processes: {cpu:.2f}; cores: {os.cpu_count()}")
    return 0 if median < ALLOWED_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
