"""accelerate launch: Hugging Face's starter, one process per GPU, with the folder's accelerate config if it has one.

Writes: a command for one node, `launch.sh` for several GPUs. The flags override what the config says of machines and
processes (accelerate/commands/launch.py, 1.15), so one config serves any number of them.
Refused: trainers that start their own processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import final

from peftplan.launchers.base import Launcher, Task, program_of
from peftplan.launchers.local import Local

CONFIG = "accelerate.yaml"
"""The name that trainers give an accelerate config."""


@final
class Accelerate(Launcher):
    name = "accelerate"
    title = "accelerate launch"
    homepage = "https://huggingface.co/docs/accelerate/package_reference/cli"
    checked = "accelerate 1.15 started two processes on each of one and two nodes, played by one CPU, and they met"

    def files(self, task: Task) -> Mapping[str, str]:
        return Local().files(_started(task))

    def command(self, task: Task) -> str:
        return Local().command(_started(task))


def _started(task: Task) -> Task:
    command = f"accelerate launch {_flags(task)} {program_of(task, 'accelerate')}"
    return replace(task, folder=replace(task.folder, command=command))


def _flags(task: Task) -> str:
    stated = f"--config_file {CONFIG}" if CONFIG in task.folder.files else "--mixed_precision no --dynamo_backend no"
    if task.alone:
        return f"{stated} --num_processes 1 --num_machines 1"
    several = "" if CONFIG in task.folder.files else " --multi_gpu"
    return (
        f"{stated}{several} --num_processes {task.gpus * task.nodes} --num_machines $NNODES --machine_rank $NODE_RANK"
        " --main_process_ip $MASTER_ADDR --main_process_port $MASTER_PORT"
    )


LAUNCHER = Accelerate
