"""Local: the trainer's own command, on the machine where it is typed.

Writes: nothing for one GPU; for several, `launch.sh`, which tells the processes how many they are. On several nodes it
is run once on each, with NODE_RANK and MASTER_ADDR set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from peftplan.launchers.base import PORT, Launcher, Task


@final
class Local(Launcher):
    name = "local"
    title = "local machine"
    homepage = "https://docs.pytorch.org/docs/stable/elastic/run.html"
    checked = "bash -n, and run for each node with what is set by hand"

    def files(self, task: Task) -> Mapping[str, str]:
        return {} if task.alone else {"launch.sh": _script(task)}

    def command(self, task: Task) -> str:
        if task.alone:
            return task.folder.command
        if task.nodes == 1:
            return "bash launch.sh"
        return f"bash launch.sh  # on every node, with NODE_RANK=0..{task.nodes - 1} and MASTER_ADDR=HOST-OF-NODE-0"


def _script(task: Task) -> str:
    if task.nodes == 1:
        meeting = ["export NODE_RANK=0 MASTER_ADDR=127.0.0.1"]
    else:
        meeting = [
            f': "${{NODE_RANK:?set NODE_RANK to 0..{task.nodes - 1}, another one on every node}}"',
            ': "${MASTER_ADDR:?set MASTER_ADDR to the address of the node with NODE_RANK=0}"',
            "export NODE_RANK MASTER_ADDR",
        ]
    lines = [
        "#!/usr/bin/env bash",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        f"export NNODES={task.nodes} NPROC_PER_NODE={task.gpus}",
        f'export MASTER_PORT="${{MASTER_PORT:-{PORT}}}"',
        *meeting,
        task.folder.command,
    ]
    return "\n".join(lines) + "\n"


LAUNCHER = Local
