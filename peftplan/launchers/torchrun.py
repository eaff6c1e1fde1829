"""torchrun: PyTorch's own starter, one process per GPU.

Writes: a command for one node, `launch.sh` for several GPUs. Sharding is what the trainer's config says; torchrun
passes none on, so an FSDP or DeepSpeed setting that lives in an accelerate config needs `accelerate` instead.
Refused: trainers that start their own processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import final

from peftplan.errors import Unsupported
from peftplan.launchers.accelerate import CONFIG
from peftplan.launchers.base import Launcher, Task, program_of
from peftplan.launchers.local import Local
from peftplan.trainers.base import TORCHRUN


@final
class Torchrun(Launcher):
    name = "torchrun"
    title = "torchrun"
    homepage = "https://docs.pytorch.org/docs/stable/elastic/run.html"
    checked = "torch 2.13 started two processes on each of one and two nodes, played by one CPU, and they met"

    def files(self, task: Task) -> Mapping[str, str]:
        return Local().files(_started(task))

    def command(self, task: Task) -> str:
        return Local().command(_started(task))


def _started(task: Task) -> Task:
    program = program_of(task, "torchrun")
    if task.shards and CONFIG in task.folder.files:
        raise Unsupported(f"launcher torchrun does not read {CONFIG}, which shards; use --launcher accelerate")
    command = f"torchrun --standalone --nproc-per-node 1 {program}" if task.alone else f"{TORCHRUN} {program}"
    return replace(task, folder=replace(task.folder, command=command))


LAUNCHER = Torchrun
