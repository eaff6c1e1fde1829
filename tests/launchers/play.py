"""Machines played by processes: a script started as a cluster starts it, with what the cluster tells it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from peftplan.trainers import Folder

TELL = 'echo "nodes=$NNODES rank=$NODE_RANK processes=$NPROC_PER_NODE at=$MASTER_ADDR:$MASTER_PORT"'
"""A training command that says what it was told."""


def folder(command: str = TELL, *, program: str | None = None, files: Mapping[str, str] | None = None) -> Folder:
    return Folder(files=files or {"config.yaml": "model: m\n"}, command=command, program=program)


def write(made: Folder, where: Path) -> Path:
    for name, text in made.files.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text)
    return where


def tool(where: Path, name: str, script: str) -> None:
    """A program of the cluster's, in `where`/bin."""
    (where / "bin").mkdir(exist_ok=True)
    path = where / "bin" / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def start(command: str, where: Path, told: Mapping[str, str]) -> str:
    """What it prints, started in `where` with nothing in its environment but PATH, HOME and `told`."""
    path = f"{where / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=where,
        env={"PATH": path, "HOME": str(where), **told},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
