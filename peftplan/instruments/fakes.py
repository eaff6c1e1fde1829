"""A model on `meta` becomes one of fake CPU tensors: right shapes and storages, no data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from peftplan.instruments import quantize, ranks
from peftplan.instruments.placing import loose_tensors


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def to_fake(model: torch.nn.Module) -> None:
    """Replace every tensor of `model` by a fake CPU tensor; what is tied or a view stays so."""
    memo: dict[int, torch.Tensor] = {}
    flat: dict[int, torch.Tensor] = {}
    for module in model.modules():
        packed = quantize.fake_weight(module)
        if packed is not None:
            memo[id(module._parameters["weight"])] = packed
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = _fake(tensor, memo, flat)
    for _, owner, key, tensor in loose_tensors(model):
        owner[key] = _fake(tensor, memo, flat)


def _fake(tensor: torch.Tensor, memo: dict[int, torch.Tensor], flat: dict[int, torch.Tensor]) -> torch.Tensor:
    if id(tensor) not in memo and ranks.local(tensor) is not tensor:
        part = ranks.respread(tensor, _fake(ranks.local(tensor), memo, flat))
        memo[id(tensor)] = _parameter(part, tensor) if isinstance(tensor, torch.nn.Parameter) else part
    if id(tensor) not in memo:
        storage = tensor.untyped_storage()
        if storage._cdata not in flat:
            size = storage.nbytes() // tensor.element_size()
            flat[storage._cdata] = torch.empty(size, dtype=tensor.dtype, device="cpu")
        view = flat[storage._cdata].as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        memo[id(tensor)] = _parameter(view, tensor) if isinstance(tensor, torch.nn.Parameter) else view
    return memo[id(tensor)]


def _parameter(view: torch.Tensor, original: torch.nn.Parameter) -> torch.nn.Parameter:
    """A parameter in place of `original`, with the hooks on its gradient."""
    made = torch.nn.Parameter(view, original.requires_grad)
    for hook in (original._backward_hooks or {}).values():
        made.register_hook(hook)
    return made


def grouped_product(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """torch._grouped_mm. Its kernels take float32 and float16 too, its stand-in for fake tensors bfloat16 alone
    (torch/_meta_registrations.py, _meta_grouped_mm_common; aten/src/ATen/native/GroupedMMUtils.h)."""
    run = torch.ops.aten._grouped_mm.default
    if not isinstance(a, FakeTensor) or a.dtype is torch.bfloat16:
        out: torch.Tensor = run(a, b, *args, **kwargs)
        return out
    like = run(a.to(torch.bfloat16), b.to(torch.bfloat16), *args, **kwargs)
    return torch.empty_strided(like.size(), like.stride(), dtype=a.dtype, device=a.device)
