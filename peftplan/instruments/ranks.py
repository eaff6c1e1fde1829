"""The first of many ranks on one machine without GPUs: torch's fake process group, and models spread over it.

Collectives of a fake group give tensors of the right shapes and never talk to anyone
(torch/testing/_internal/distributed/fake_pg.py). The model is spread by transformers' own code, as
`from_pretrained(distributed_config=DistributedConfig(tp_size=...))` does it: before it has weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from peftplan.job import Job
from peftplan.layouts import Layout, Pipeline, knobs_of, layout_of, stated_world
from peftplan.plugins import configure

_WRAPPERS = frozenset({"DTensor", "AsyncCollectiveTensor"})
"""Tensors that stand for others: their operators call those of what they hold (torch.distributed.tensor._api,
torch.distributed._functional_collectives)."""


def layout_of_job(job: Job) -> Layout:
    """How the job is spread."""
    own, _ = knobs_of(job.knobs("layout"))
    gpus = job.gpus if job.gpus * job.nodes > 1 else stated_world(job.layout)
    return layout_of(job.layout, gpus=gpus, nodes=job.nodes, settings=configure(Pipeline, own, what="layout"))


def unwraps(types: Any) -> bool:
    """Whether one of the classes that take part in an operator is such a stand-in."""
    return any(cls.__name__ in _WRAPPERS for cls in types)


def waits(func: Any) -> bool:
    """Whether an operator waits for a collective: what it returns is what it was given."""
    return func.namespace == "_c10d_functional" and str(func) == "_c10d_functional.wait_tensor.default"


def local(tensor: Any) -> Any:
    """What a rank holds of a tensor that is spread; any other tensor itself."""
    kind = type(tensor).__name__
    if kind not in _WRAPPERS:
        return tensor
    return local(tensor._local_tensor if kind == "DTensor" else tensor.elem)


def untied(layout: Layout) -> Any:
    """Weights of a model to be spread are tied when that is done."""
    if layout.mesh.tp == 1:
        return nullcontext()
    from transformers import initialization

    return initialization.no_tie_weights()


def spread(model: Any, layout: Layout) -> Any:
    """The model with its weights and forwards spread as transformers' plan says."""
    tp = layout.mesh.tp
    if tp == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.utils import TransformersDeviceMesh

    shape = (1, layout.replicates, layout.shards, tp)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
    config = DistributedConfig(tp_size=tp)
    return type(model).maybe_distribute_model(model, config, TransformersDeviceMesh(mesh, mesh))


def mesh_of(model: Any, layout: Layout) -> Any:
    """The ranks that share the shards of a model that others share the matrices of."""
    base = model.get_base_model() if "peft_config" in vars(model) else model
    return base._mesh_manager.get_mesh(("dp_replicate", "fsdp") if layout.replicates > 1 else "fsdp")


@contextmanager
def real_meshes() -> Iterator[None]:
    """Meshes are looked at by value, also where tensors are fake."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.distributed.device_mesh import DeviceMesh

    joined = DeviceMesh._concatenate

    def apart(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return joined(*args, **kwargs)

    DeviceMesh._concatenate = staticmethod(apart)
    try:
        yield
    finally:
        DeviceMesh._concatenate = staticmethod(joined)


def respread(tensor: Any, part: torch.Tensor) -> torch.Tensor:
    """A tensor spread as `tensor` is, of which this rank holds `part`."""
    from torch.distributed.tensor import DTensor

    return DTensor(part, tensor._spec, requires_grad=tensor.requires_grad)


def mend(model: Any) -> None:
    """Tell the spread linear layers of adapters how wide they are as a whole.

    PEFT 0.21.2 makes them as wide as a rank's part (tuners/tuners_utils.py, _get_in_out_features), which transformers
    takes for the whole since it reads the width (distributed/tensor_parallel.py, RowwiseParallel; 5.23 does): backward
    fails on shapes.
    """
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, torch.nn.Linear) and weight is not None and local(weight) is not weight:
            module.out_features, module.in_features = weight.shape
