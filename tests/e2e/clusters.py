"""Run inside a cluster tool's own environment: `python clusters.py TOOL FILE` fails where the tool rejects the file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


def skypilot(path: Path) -> None:
    """SkyPilot's task schema; unknown keys are rejected."""
    import yaml
    from sky.utils import common_utils, schemas

    common_utils.validate_schema(yaml.safe_load(path.read_text()), schemas.get_task_schema(), "task: ")


def kubernetes(path: Path) -> None:
    """Read into the clients' models and written again: what they do not know is lost, and so is found."""
    import yaml
    from kubeflow.training import models
    from kubernetes import client

    config, job = yaml.safe_load_all(path.read_text())
    api = client.ApiClient()
    _same(config, _through(api, config, client.V1ConfigMap))
    for name in ("KubeflowOrgV1PyTorchJob", "KubeflowOrgV1PyTorchJobSpec", "KubeflowOrgV1ReplicaSpec"):
        _known(name, getattr(models, name), job)
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        _same(replica["template"], _through(api, replica["template"], client.V1PodTemplateSpec))


def _through(api: Any, data: Any, model: Any) -> Any:
    class Answer:
        data: str

    import json

    answer = Answer()
    answer.data = json.dumps(data)
    return api.sanitize_for_serialization(api.deserialize(answer, model))


def _same(given: Any, seen: Any) -> None:
    assert given == seen, f"the client's model reads {seen} of {given}"


def _known(name: str, model: Any, job: Any) -> None:
    """The CRD's own levels: every key is an attribute of the model."""
    levels = {
        "KubeflowOrgV1PyTorchJob": [job],
        "KubeflowOrgV1PyTorchJobSpec": [job["spec"]],
        "KubeflowOrgV1ReplicaSpec": list(job["spec"]["pytorchReplicaSpecs"].values()),
    }
    for level in levels[name]:
        unknown = set(level) - set(model.attribute_map.values())
        assert not unknown, f"{name} has no {unknown}"


def ray(path: Path) -> None:
    """Run on a cluster of two nodes, each said to have two GPUs, with worker processes of this machine."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=20, num_gpus=2)
    os.environ["RAY_ADDRESS"] = cluster.address
    os.chdir(path.parent)
    exec(compile(path.read_text(), str(path), "exec"), {"__name__": "__main__"})
    ray.shutdown()  # before the nodes go, or the driver dies with them
    cluster.shutdown()


if __name__ == "__main__":
    {"skypilot": skypilot, "kubernetes": kubernetes, "ray": ray}[sys.argv[1]](Path(sys.argv[2]))
