"""Kubernetes: a PyTorchJob of Kubeflow's training operator, one pod per node, with the folder in a ConfigMap.

Writes: `job.k8s.yaml` and the command that applies it. The operator gives every pod MASTER_ADDR, MASTER_PORT and, as
RANK, its number among the pods (pkg/controller.v1/pytorch/envvar.go); they are renamed, and RANK and WORLD_SIZE are
taken away from the command, which would take them for a process's.
Not written: a node selector for the type of GPU, whose labels differ between clusters (a comment says where).
Refused: folders above 1 MiB, which a ConfigMap does not hold; put data on the volume.
Fields of kubeflow.org/v1 as in the client kubeflow-training 1.9.4, of pods as in kubernetes 35.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from peftplan.errors import Unsupported
from peftplan.launchers.base import Launcher, Task, document

FILE = "job.k8s.yaml"
IMAGE = "your-registry/your-image:tag"
"""A placeholder: an image with CUDA, Python 3.10 or newer and pip."""
MOST_BYTES = 2**20
"""kubernetes.io/docs/concepts/configuration/configmap, 2026-11: 1 MiB; the API server counts keys too."""
_SOURCE, _WORK = "/config", "/work"


@final
class Kubernetes(Launcher):
    name = "kubernetes"
    title = "Kubernetes (Kubeflow PyTorchJob)"
    homepage = "https://www.kubeflow.org/docs/components/trainer/legacy-v1/user-guides/pytorch/"
    checked = "the models of kubeflow-training 1.9.4 and kubernetes 35.0; its script run by two processes"

    def files(self, task: Task) -> Mapping[str, str]:
        size = sum(len(text.encode()) for text in task.folder.files.values())
        if size > MOST_BYTES * 9 // 10:
            raise Unsupported(f"launcher kubernetes: the folder's files have {size} bytes, a ConfigMap holds 1 MiB")
        head = [] if task.gpu is None else [f"# Priced for {task.gpu}: add the nodeSelector your cluster has for it."]
        return {FILE: "\n".join([*head, document(_config_map(task)) + "---", document(_job(task))])}

    def command(self, task: Task) -> str:
        del task
        return f"kubectl apply -f {FILE}"


def _config_map(task: Task) -> dict[str, Any]:
    data = {_key(name): text for name, text in task.folder.files.items()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": task.place.name}, "data": data}


def _key(name: str) -> str:
    """A ConfigMap's keys hold no slashes."""
    return name.replace("/", "__")


def _job(task: Task) -> dict[str, Any]:
    replicas = {"Master": _replica(task, 1)}
    if task.nodes > 1:
        replicas["Worker"] = _replica(task, task.nodes - 1)
    policy: dict[str, Any] = {"cleanPodPolicy": "None"}
    if task.place.hours is not None:
        policy["activeDeadlineSeconds"] = 3600 * task.place.hours
    spec = {"runPolicy": policy, "nprocPerNode": str(task.gpus), "pytorchReplicaSpecs": replicas}
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": task.place.name}, "spec": spec}


def _replica(task: Task, count: int) -> dict[str, Any]:
    container = {
        "name": "pytorch",
        "image": task.place.image or IMAGE,
        "command": ["bash", "-c", "\n".join(_script(task)) + "\n"],
        "resources": {"limits": {"nvidia.com/gpu": str(task.gpus)}},
        "volumeMounts": [
            {"name": "folder", "mountPath": _SOURCE},
            {"name": "work", "mountPath": _WORK},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    pod = {"containers": [container], "volumes": list(_volumes(task))}
    return {"replicas": count, "restartPolicy": "Never", "template": {"spec": pod}}


def _volumes(task: Task) -> Iterator[dict[str, Any]]:
    items = [{"key": _key(name), "path": name} for name in task.folder.files]
    yield {"name": "folder", "configMap": {"name": task.place.name, "items": items}}
    if task.place.volume is not None:
        yield {"name": "work", "persistentVolumeClaim": {"claimName": task.place.volume}}
    else:
        yield {"name": "work", "emptyDir": {}}
    yield {"name": "shm", "emptyDir": {"medium": "Memory"}}


def _script(task: Task) -> Iterator[str]:
    yield "set -euo pipefail"
    yield f"cp -rL {_SOURCE}/. {_WORK} && cd {_WORK}"
    if task.installs:
        yield "pip install -r requirements.txt"
    if not task.alone:
        yield f"export NNODES={task.nodes} NPROC_PER_NODE={task.gpus} NODE_RANK=$RANK"
    yield "unset RANK WORLD_SIZE"
    yield task.folder.command


LAUNCHER = Kubernetes
