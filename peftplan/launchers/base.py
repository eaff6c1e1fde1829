"""What a launcher is: it turns a trainer's folder into one that starts on a machine or a cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import yaml

from peftplan.errors import RequestError, Unsupported
from peftplan.job import Job
from peftplan.trainers.base import Folder

EXAMPLES = ((1, 1), (8, 1), (8, 2))
"""(GPUs per node, nodes) that every launcher is tested with."""
PORT = 29500
"""torchrun's and accelerate's default port of the first node (torch.distributed.run 2.13, 2026-11)."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What only the owner of a cluster knows. What is None is left to the cluster, or written as a placeholder."""

    name: str = "peftplan"
    """Of the run: letters, digits and `-`."""
    image: str | None = None
    """A container image with CUDA, Python and the trainer's requirements, or pip to install them."""
    hours: int | None = None
    partition: str | None = None
    account: str | None = None
    volume: str | None = None
    """What the trained weights outlive the run on: a Kubernetes volume claim."""
    cpus_per_gpu: int = 8
    """Nodes for training mostly have more (AWS p4d 12 and p5 24 virtual cores per GPU, recalled 2026-11); where fewer
    are there, the cluster refuses the job at once."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be started: a folder, on `nodes` machines with `gpus` GPUs each."""

    folder: Folder
    gpus: int
    nodes: int
    gpu: str | None
    place: Place
    layout: str | None = None

    @property
    def shards(self) -> bool:
        """Whether something must say how weights or states are spread."""
        return self.layout not in (None, "none", "single", "ddp")

    @property
    def alone(self) -> bool:
        """One process: there is nothing to meet."""
        return self.gpus * self.nodes == 1

    @property
    def installs(self) -> bool:
        return "requirements.txt" in self.folder.files


class Launcher(ABC):
    """A way to start training. Subclasses say what they add to the folder and the command that starts it."""

    name: ClassVar[str]
    title: ClassVar[str]
    homepage: ClassVar[str]
    checked: ClassVar[str]
    """How what it writes was checked, and against which version."""

    @final
    def launch(self, folder: Folder, job: Job, place: Place | None = None) -> Folder:
        """`folder` with what starts it on the job's `nodes` x `gpus`; its command is run once, where one stands.

        Raises Unsupported for what the launcher cannot start, RequestError where it would overwrite a file.
        """
        task = Task(
            folder=folder, gpus=job.gpus, nodes=job.nodes, gpu=job.gpu, place=place or Place(), layout=job.layout
        )
        added = self.files(task)
        clash = sorted(set(added) & set(folder.files))
        if clash:
            raise RequestError(f"launcher {self.name} writes {clash[0]}, which the trainer writes too; use another one")
        return Folder(files={**folder.files, **added}, command=self.command(task), program=self.program(task))

    @abstractmethod
    def files(self, task: Task) -> Mapping[str, str]:
        """Files to add, by relative name."""

    @abstractmethod
    def command(self, task: Task) -> str:
        """What to type."""

    def program(self, task: Task) -> str | None:
        """What one process runs, where another launcher may still start the processes."""
        del task
        return None


def program_of(task: Task, launcher: str) -> str:
    """What one process runs. Raises Unsupported where the trainer must start its processes itself."""
    if task.folder.program is None:
        raise Unsupported(f"launcher {launcher}: this trainer starts its own processes; use --launcher local")
    return task.folder.program


def document(data: Mapping[str, Any]) -> str:
    """YAML with texts of several lines as blocks."""
    return yaml.dump(data, Dumper=_Blocks, sort_keys=False, default_flow_style=False, width=1000)


class _Blocks(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Blocks.add_representer(str, _text)
