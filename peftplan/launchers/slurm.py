"""Slurm: a batch script; srun runs the trainer's command once on every node.

Writes: `job.sbatch`, which is submitted, and `node.sh`, what every node runs. The first node of the allocation is
where the others meet; the port follows the job's number, since jobs may share a node.
Not written: `--mem` and the type of GPU, whose names and defaults differ between clusters (a comment says where).
Options and variables as in sbatch's and srun's manual pages, Slurm 25.05: srun has not inherited `--cpus-per-task`
since 22.05, and tells each task its node as SLURM_NODEID.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import final

from peftplan.launchers.base import Launcher, Task

FILE, NODE = "job.sbatch", "node.sh"


@final
class Slurm(Launcher):
    name = "slurm"
    title = "Slurm"
    homepage = "https://slurm.schedmd.com/sbatch.html"
    checked = "bash -n, options against sbatch's manual; run with srun and scontrol played by two processes"

    def files(self, task: Task) -> Mapping[str, str]:
        batch = [*_options(task), "", *_body(task)]
        return {FILE: "\n".join(batch) + "\n", NODE: "\n".join(_node(task)) + "\n"}

    def command(self, task: Task) -> str:
        del task
        return f"sbatch {FILE}"


def _options(task: Task) -> Iterator[str]:
    place = task.place
    yield "#!/usr/bin/env bash"
    yield f"#SBATCH --job-name={place.name}"
    yield f"#SBATCH --nodes={task.nodes}"
    yield "#SBATCH --ntasks-per-node=1"
    yield f"#SBATCH --gpus-per-node={task.gpus}"
    yield f"#SBATCH --cpus-per-task={place.cpus_per_gpu * task.gpus}"
    yield "#SBATCH --output=%x-%j.out"
    if place.hours is not None:
        yield f"#SBATCH --time={place.hours}:00:00"
    if place.partition is not None:
        yield f"#SBATCH --partition={place.partition}"
    if place.account is not None:
        yield f"#SBATCH --account={place.account}"
    if task.gpu is not None:
        yield f"# Priced for {task.gpu}: ask for it by the name your cluster has, --gpus-per-node=TYPE:{task.gpus}"


def _body(task: Task) -> Iterator[str]:
    yield "set -euo pipefail"
    yield 'cd "$SLURM_SUBMIT_DIR"'
    if not task.alone:
        yield f"export NNODES={task.nodes} NPROC_PER_NODE={task.gpus}"
        yield 'HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")'
        yield "MASTER_ADDR=${HOSTS%%$'\\n'*}"
        yield "MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))"
        yield "export MASTER_ADDR MASTER_PORT"
    yield f'srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash {NODE}'


def _node(task: Task) -> Iterator[str]:
    yield "#!/usr/bin/env bash"
    yield "set -euo pipefail"
    if not task.alone:
        yield 'export NODE_RANK="$SLURM_NODEID"'
    yield task.folder.command


LAUNCHER = Slurm
