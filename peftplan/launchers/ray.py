"""Ray Train: a script that takes whole nodes of a Ray cluster and runs the trainer's command once on each.

Writes: `start_ray.py` and the command that runs it. Every Ray worker holds all the GPUs that one node gives; worker 0's
address, which Ray Train publishes, is where the processes meet, and what Ray says of processes is taken away from the
command, which starts its own. Every node trains in Ray Train's artifacts folder for the run, in a copy of the files;
there a relative output folder stays, on the first node.
Signatures as in Ray 2.60.0: ray.train.torch.TorchTrainer, TorchConfig, ray.train.ScalingConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from peftplan.launchers.base import PORT, Launcher, Task

FILE = "start_ray.py"


@final
class Ray(Launcher):
    name = "ray"
    title = "Ray Train"
    homepage = "https://docs.ray.io/en/latest/train/train.html"
    checked = "Ray 2.60.0: run on a cluster of two nodes played by one machine without GPUs"

    def files(self, task: Task) -> Mapping[str, str]:
        return {FILE: _script(task)}

    def command(self, task: Task) -> str:
        del task
        return f"python {FILE}"


def _script(task: Task) -> str:
    environment = '{"working_dir": ".", "pip": "requirements.txt"}' if task.installs else '{"working_dir": "."}'
    return f'''"""Runs the training command once on every node, through Ray Train."""

import os
import shutil
import subprocess
import sys

import ray
from ray.train import ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer

NODES, GPUS, CPUS_PER_GPU = {task.nodes}, {task.gpus}, {task.place.cpus_per_gpu}
COMMAND = {task.folder.command!r}
OF_A_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK")


def node() -> None:
    kept = {{name: value for name, value in os.environ.items() if name not in OF_A_PROCESS}}
    told = {{
        "NNODES": str(NODES),
        "NODE_RANK": str(get_context().get_world_rank()),
        "NPROC_PER_NODE": str(GPUS),
        "MASTER_ADDR": os.environ["MASTER_ADDR"],
        "MASTER_PORT": "{PORT}",
    }}
    folder = next(path for path in sys.path if os.path.isfile(os.path.join(path, "{FILE}")))
    shutil.copytree(folder, ".", dirs_exist_ok=True)
    print("training in", os.getcwd(), flush=True)
    subprocess.run(["bash", "-c", COMMAND], check=True, env={{**kept, **told}})


if __name__ == "__main__":
    ray.init(runtime_env={environment})
    scaling = ScalingConfig(
        num_workers=NODES,
        use_gpu=True,
        resources_per_worker={{"GPU": GPUS, "CPU": CPUS_PER_GPU * GPUS}},
        placement_strategy="STRICT_SPREAD",
    )
    TorchTrainer(node, torch_config=TorchConfig(backend="gloo"), scaling_config=scaling).fit()
'''


LAUNCHER = Ray
