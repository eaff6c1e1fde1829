"""The real wrappers of data parallelism around a traced model, in torch's fake process group: one rank of many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftplan.errors import Unsupported
from peftplan.instruments.ranks import layout_of_job, mesh_of, real_meshes
from peftplan.instruments.recorder import GATHERED, Recorder
from peftplan.job import Job
from peftplan.layouts import Layout, knobs_of
from peftplan.layouts.fsdp2 import Fsdp2
from peftplan.layouts.styles import style_of
from peftplan.units import parse_dtype


def layout_traced(job: Job) -> Layout:
    """The job's layout. Raises Unsupported for what no wrapper here makes."""
    layout = layout_of_job(job)
    mesh = layout.mesh
    runs = layout.style == "fsdp2" or (layout.dp == 1 and mesh.tp > 1)
    if not layout.alone and (not runs or layout.pp > 1 or mesh.cp * mesh.ep > 1 or mesh.plan != "transformers"):
        raise Unsupported(f"--layout {job.layout or layout.style}: the trace cannot run it; it can: fsdp, or tp=N")
    return layout


@contextmanager
def group(layout: Layout) -> Iterator[None]:
    """The first rank of a world in which nobody answers, and nothing is sent."""
    if layout.alone:
        yield
        return
    import bitsandbytes.nn.modules as packing
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world)
    finding = packing.fix_4bit_weight_quant_state_from_module
    packing.fix_4bit_weight_quant_state_from_module = _found_again
    try:
        yield
    finally:
        packing.fix_4bit_weight_quant_state_from_module = finding
        dist.destroy_process_group()


def _found_again(module: Any) -> None:
    """A gathered weight has lost its constants, which its module still has: as bitsandbytes, but on a fake tensor."""
    module.weight.quant_state = module.quant_state


def wrap(model: Any, job: Job, layout: Layout, layers: list[Any]) -> Any:
    """The model as the layout's framework wraps it, decoder layer by decoder layer."""
    if layout.alone or layout.style != "fsdp2":
        return model
    style = style_of(layout.style, knobs_of(job.knobs("layout"))[1])
    assert isinstance(style, Fsdp2)
    return _fully_shard(model, style, layout, layers, mixed=_mixed(job))


def whole_gradients(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What micro-batches that reduced nothing have left."""
    for path, module in model.named_modules():
        for held in _held(module):
            for found in (held.unsharded_accumulated_grad, held._unsharded_param.grad):
                if found is not None:
                    yield f"{path}.{held._param_fqn}", found


def _held(module: Any) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        state: Any = module._get_fsdp_state()
        for own in state._fsdp_param_groups:
            yield from (held for held in own.fsdp_params if "_unsharded_param" in vars(held))


@contextmanager
def unsynchronised(model: Any, job: Job) -> Iterator[None]:
    """A micro-batch that another one follows, as accelerate's `no_sync` runs it, unless the job says otherwise."""
    layout = layout_traced(job)
    if layout.alone or not job.knobs("layout").get("no_sync", True):
        yield
        return
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def _mixed(job: Job) -> torch.dtype | None:
    return {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}.get(job.precision or "")


def _fully_shard(model: Any, style: Fsdp2, layout: Layout, layers: list[Any], *, mixed: torch.dtype | None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    gathered = _torch(style.param_dtype) if style.param_dtype is not None else mixed
    reduced = _torch(style.reduce_dtype) if style.reduce_dtype is not None else gathered
    if style.upcasts(mixed=mixed is not None, packed=any(_packed(p) for p in model.parameters())):
        for p in model.parameters():
            if p.requires_grad and p.dtype is not torch.float32:
                p.data = p.data.to(torch.float32)
    shape = (layout.replicates, layout.shards) if layout.replicates > 1 else (layout.shards,)
    if layout.mesh.tp > 1:
        mesh = mesh_of(model, layout)
    else:
        with unset_fake_temporarily():
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    ignored = {p for p in model.parameters() if _packed(p) and not p.is_floating_point()}
    given = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=reduced),
        "ignored_params": ignored,
    }
    with real_meshes():
        for layer in layers:
            fully_shard(layer, reshard_after_forward=style.reshard_after_forward, **given)
        fully_shard(model, **given)
    return model


def _torch(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, parse_dtype(name).label)
    return found


def _packed(param: Any) -> bool:
    return "quant_state" in vars(param)


@contextmanager
def resized(recorder: Recorder) -> Iterator[None]:
    """Tell the recorder of whole parameters: their storages are given bytes, and lose them, without an operator."""
    import torch.distributed.fsdp._fully_shard._fsdp_param as home

    originals = home.alloc_storage, home.free_storage

    def watched(act: Callable[[Any], None]) -> Callable[[Any], None]:
        def run(tensor: Any) -> None:
            act(tensor)
            recorder.add(tensor, GATHERED, "")

        return run

    home.alloc_storage, home.free_storage = watched(originals[0]), watched(originals[1])
    try:
        yield
    finally:
        home.alloc_storage, home.free_storage = originals
