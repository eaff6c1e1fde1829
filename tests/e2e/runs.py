"""Running a written folder: `train(folder, command, python=venv("axolotl"))`, and what to look at afterwards."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROBE = Path(__file__).parent / "probe"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the probe saw on one rank; `probe/sitecustomize.py` says what the numbers are."""

    steps: int
    losses: list[float]
    optimizer: str
    optimizer_state_bytes: int
    optimized: int
    parameters: int
    trainable: int
    classes: dict[str, int]
    dtypes: dict[str, int]
    trainable_dtypes: dict[str, int]
    checkpointing: bool
    world: int
    backend: str | None
    distributed_type: str | None


def train(
    folder: Path,
    command: str,
    *,
    python: Path,
    processes: int = 1,
    extra_path: Iterable[Path] = (),
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 300,
) -> list[Facts]:
    """Runs `command` inside `folder` with the environment of `python` and returns one `Facts` per rank.

    With several processes, accelerate takes the CPU for its accelerator. AssertionError with the end of the output
    where the command fails, or a rank took no step.
    """
    seen = folder / "probe"
    seen.mkdir(exist_ok=True)
    own = {**_environment(python, seen, extra_path), **(environment or {})}
    if processes > 1:
        own["PEFTPLAN_CPU_ACCEL"] = "1"
    code, output = _run(command, folder, own, timeout_seconds)
    assert code == 0, f"{command}: exit {code}\n{output[-4000:]}"
    ranks = read(seen)
    assert len(ranks) == processes, f"{len(ranks)} of {processes} ranks took a step\n{output[-4000:]}"
    return ranks


def train_warm(
    folders: Iterable[Path],
    *,
    python: Path,
    extra_path: Iterable[Path] = (),
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 580,
) -> None:
    """Trains folders of one trainer one after the other in one process (`warm.py`), without their commands.

    `trained` then says what happened in each.
    """
    paths = list(folders)
    own = {**_environment(python, paths[0].parent, extra_path), **(environment or {})}
    command = shlex.join([str(python), str(Path(__file__).with_name("warm.py")), *map(str, paths)])
    code, output = _run(command, paths[0].parent, own, timeout_seconds)
    assert code == 0, output[-4000:]


def trained(folder: Path) -> Facts:
    """What `train_warm` did with a folder. AssertionError with the end of its output where it failed."""
    code, output = (folder / "code").read_text(), (folder / "output.log").read_text(errors="replace")
    assert code == "0", f"{folder.name}: exit {code}\n{output[-2000:]}"
    (facts,) = read(folder / "probe")
    return facts


def read(seen: Path) -> list[Facts]:
    """What the ranks left in the probe's folder."""
    return [Facts(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(seen.glob("rank*.json"))]


def assert_trained(facts: Facts, *, trainable: int, steps: int = 2) -> None:
    """At least so many optimizer steps, every loss finite, exactly so many parameters trained."""
    assert facts.steps >= steps
    assert facts.losses
    assert all(math.isfinite(loss) for loss in facts.losses), facts.losses
    assert facts.trainable == trainable, (facts.trainable, trainable)


def saved_numel(folder: Path, pattern: str = "adapter_model*.safetensors") -> int:
    """Numbers in the one set of safetensors files below `folder` that lies highest (later checkpoints aside)."""
    found = sorted(folder.rglob(pattern), key=lambda path: (len(path.parts), path.name))
    assert found, f"no {pattern} below {folder}: {sorted(p.name for p in folder.rglob('*'))}"
    return sum(_numel(path) for path in found if path.parent == found[0].parent)


def _numel(path: Path) -> int:
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _environment(python: Path, seen: Path, extra_path: Iterable[Path]) -> dict[str, str]:
    keep = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR", "TRITON_CACHE_DIR") if key in os.environ}
    return keep | {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, (PROBE, *extra_path))),
        "PEFTPLAN_PROBE": str(seen),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(seen.parent / "hf-home"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _run(command: str, folder: Path, environment: dict[str, str], timeout_seconds: float) -> tuple[int, str]:
    """Exit code and all output; a run that takes too long is ended with all its processes."""
    log = folder / "output.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            shlex.split(command), cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    return code, log.read_text(encoding="utf-8", errors="replace")
