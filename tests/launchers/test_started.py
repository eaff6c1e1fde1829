"""torchrun and accelerate start processes that find each other, on nodes played by this machine's CPU."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from peftplan import launchers
from peftplan.job import Job
from tests.launchers.play import folder, write

pytestmark = [pytest.mark.trace, pytest.mark.slow]
MEET = r"""
import os, torch, torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank())])
dist.all_reduce(total)
os.write(1, f"heard {dist.get_world_size()} {total.item():g}\n".encode())
dist.destroy_process_group()
"""
CONFIG = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 1\nmixed_precision: 'no'\n"


def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def nodes(command: str, where: Path, count: int) -> list[str]:
    """What the processes of `count` nodes print."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            ["bash", "-c", command],
            cwd=where,
            env={**os.environ, **meeting, "NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [node.communicate(timeout=120) for node in started]
    assert [node.returncode for node in started] == [0] * count, said
    return [line for out, _ in said for line in out.splitlines() if line.startswith("heard")]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_processes_find_each_other(name: str, count: int, tmp_path: Path) -> None:
    files = {"meet.py": MEET} | ({"accelerate.yaml": CONFIG} if name == "accelerate" else {})
    made = launchers.get(name).launch(
        folder("", program="meet.py", files=files), Job(model="llama-7b", gpus=2, nodes=count)
    )
    world = 2 * count
    heard = nodes(made.command, write(made, tmp_path), count)
    assert heard == [f"heard {world} {world * (world - 1) // 2}"] * world
