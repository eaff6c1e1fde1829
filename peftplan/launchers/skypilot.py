"""SkyPilot: a task that rents the machines, installs the requirements and runs the command on every node.

Writes: `task.sky.yaml` and the command that launches it. SkyPilot tells every node its rank and the others' addresses;
the first address is where they meet. The folder itself is the task's work directory.
Refused: GPUs that SkyPilot's catalog does not name.
Keys as in sky/utils/schemas.py, variables as in sky/skylet/constants.py, SkyPilot 0.14.1; GPU names as in
skypilot-org/skypilot-catalog, catalogs/v8/common/accelerators.csv, 2026-11.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from peftplan.errors import Unsupported
from peftplan.hardware.find import find_gpu
from peftplan.launchers.base import PORT, Launcher, Task, document

FILE = "task.sky.yaml"
GPUS: dict[str, str] = {
    "NVIDIA P100 PCIe 16GB": "P100",
    "NVIDIA V100 SXM2 16GB": "V100",
    "NVIDIA V100 SXM2 32GB": "V100-32GB",
    "NVIDIA T4": "T4",
    "NVIDIA GeForce RTX 3060 12GB": "RTX3060",
    "NVIDIA GeForce RTX 3090": "RTX3090",
    "NVIDIA GeForce RTX 4070": "RTX4070",
    "NVIDIA GeForce RTX 4090": "RTX4090",
    "NVIDIA GeForce RTX 5070": "RTX5070",
    "NVIDIA GeForce RTX 5090": "RTX5090",
    "NVIDIA RTX A4000": "RTXA4000",
    "NVIDIA RTX A4500": "RTXA4500",
    "NVIDIA RTX A5000": "RTXA5000",
    "NVIDIA RTX A6000": "RTXA6000",
    "NVIDIA A10": "A10",
    "NVIDIA A10G": "A10G",
    "NVIDIA A16": "A16",
    "NVIDIA A30": "A30",
    "NVIDIA A40": "A40",
    "NVIDIA A100 SXM4 40GB": "A100",
    "NVIDIA A100 PCIe 40GB": "A100",
    "NVIDIA A100 SXM4 80GB": "A100-80GB",
    "NVIDIA A100 PCIe 80GB": "A100-80GB",
    "NVIDIA A800 SXM4 80GB": "A800",
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40S",
    "NVIDIA RTX 6000 Ada": "RTX6000-Ada",
    "NVIDIA RTX 4000 Ada": "RTX4000-Ada",
    "NVIDIA RTX PRO 6000 Blackwell Workstation": "RTXPRO6000-WK",
    "NVIDIA RTX PRO 6000 Blackwell Server": "RTXPRO6000",
    "NVIDIA H100 SXM5 80GB": "H100",
    "NVIDIA H100 PCIe 80GB": "H100",
    "NVIDIA H100 NVL 94GB": "H100-NVL",
    "NVIDIA H200 SXM 141GB": "H200",
    "NVIDIA GH200 96GB": "GH200",
    "NVIDIA B200 SXM": "B200",
    "NVIDIA B300 SXM": "B300",
    "AMD Instinct MI300X": "MI300X",
}
"""The catalog's name of a card: SkyPilot's. It does not tell SXM from PCIe."""


@final
class SkyPilot(Launcher):
    name = "skypilot"
    title = "SkyPilot"
    homepage = "https://docs.skypilot.co/en/latest/reference/yaml-spec.html"
    checked = "SkyPilot 0.14.1's own task schema; its script run by two processes with SkyPilot's variables"

    def files(self, task: Task) -> Mapping[str, str]:
        data: dict[str, Any] = {
            "name": task.place.name,
            "workdir": ".",
            "num_nodes": task.nodes,
            "resources": _resources(task),
        }
        if task.installs:
            data["setup"] = "pip install -r requirements.txt\n"
        return {FILE: document({**data, "run": "\n".join(_run(task)) + "\n"})}

    def command(self, task: Task) -> str:
        return f"sky launch -c {task.place.name} {FILE}"


def _resources(task: Task) -> dict[str, Any]:
    if task.gpu is None:
        raise Unsupported("launcher skypilot rents machines by their GPU; pass --gpu")
    card = find_gpu(task.gpu).name
    if card not in GPUS:
        raise Unsupported(f"launcher skypilot: its catalog does not rent {card}; it has {', '.join(GPUS.values())}")
    resources: dict[str, Any] = {"accelerators": f"{GPUS[card]}:{task.gpus}"}
    if task.place.image is not None:
        resources["image_id"] = f"docker:{task.place.image}"
    return resources


def _run(task: Task) -> Iterator[str]:
    yield "set -euo pipefail"
    if not task.alone:
        yield "export NNODES=$SKYPILOT_NUM_NODES NPROC_PER_NODE=$SKYPILOT_NUM_GPUS_PER_NODE"
        yield "export NODE_RANK=$SKYPILOT_NODE_RANK"
        yield f"export MASTER_ADDR=${{SKYPILOT_NODE_IPS%%$'\\n'*}} MASTER_PORT={PORT}"
    yield task.folder.command


LAUNCHER = SkyPilot
