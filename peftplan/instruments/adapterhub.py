"""A job on a method of AdapterHub's `adapters` library: put on the model as its own users do.

`adapters` pins its transformers (1.3.0: 4.57), so such a job is traced by an interpreter of its own:
`python -m peftplan.instruments.trace JOB.json`, where `adapters` and pydantic are installed. No PEFT is needed there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peftplan import methods
from peftplan.errors import UnknownName
from peftplan.job import Job

_NAME = "trained"


def belongs(method: str) -> bool:
    """Whether a method is one of `adapters`'."""
    return methods.adapterhub(method) is not None


def adapt(model: torch.nn.Module, job: Job, dtype: torch.dtype | None) -> torch.nn.Module:
    """adapters.init, add_adapter and train_adapter; what they add is cast to `dtype`."""
    import adapters

    before = {id(param) for param in model.parameters()}
    with next(model.parameters()).device:
        adapters.init(model)
        _train(model, job)
    for param in model.parameters():
        if id(param) not in before and dtype is not None:
            param.data = param.data.to(dtype)
    return model


def _train(model: Any, job: Job) -> None:
    """With adapters' own config objects: the one that the method's name stands for, the settings laid over it."""
    from adapters import AdapterConfig

    cls = methods.adapterhub(job.method)
    if cls is None:
        raise UnknownName("method", job.method, ())
    knobs = {**methods.resolve_name(job.method)[1], **job.knobs("method")}
    if job.rank is not None:
        knobs["r"] = job.rank
    mine = {name: value for name, value in knobs.items() if name not in (*cls.fused, "num_adapters")}
    config = _union(cls, mine) if cls.parts else AdapterConfig.load(cls.base_config, **mine)
    if not cls.fused:
        model.add_adapter(_NAME, config=config)
        model.train_adapter(_NAME)
        return
    count = methods.make(job.method, knobs).knob("num_adapters")
    _fuse(model, config, count, {name: knobs[name] for name in cls.fused if name in knobs})


def _union(cls: type[methods.AdapterHub], knobs: dict[str, Any]) -> Any:
    """The library's own union, the settings of each part laid over that part."""
    from adapters import AdapterConfig, ConfigUnion

    whole: Any = AdapterConfig.load(cls.base_config)
    said = (knobs.get(name) or {} for name in cls.parts)
    return ConfigUnion(*[part.replace(**each) for part, each in zip(whole.configs, said, strict=True)])


def _fuse(model: Any, config: Any, count: int, knobs: dict[str, Any]) -> None:
    from adapters import DynamicAdapterFusionConfig, Fuse

    names = [f"{_NAME}_{i}" for i in range(count)]
    for name in names:
        model.add_adapter(name, config=config)
    model.add_adapter_fusion(Fuse(*names), config=DynamicAdapterFusionConfig(**knobs).to_dict())
    model.train_adapter_fusion(Fuse(*names))


@contextmanager
def sized() -> Iterator[None]:
    """Let adapters shape a Kronecker product (Compacter): it computes the sizes in tensors, whose values fakes lack."""
    modeling: Any = sys.modules.get("adapters.methods.modeling")
    if modeling is None:
        yield
        return
    original = modeling.kronecker_product

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        found = a[..., :, None, :, None] * b[..., None, :, None, :]
        return found.reshape(*found.shape[:-4], a.shape[-2] * b.shape[-2], a.shape[-1] * b.shape[-1])

    modeling.kronecker_product = product
    try:
        yield
    finally:
        modeling.kronecker_product = original


def checkpoint_layers(model: Any, job: Job) -> None:
    """Full recomputation; `adapters` says itself that it has none with `use_reentrant`."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=job.knobs("recompute") or None)
