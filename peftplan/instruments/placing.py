"""Random weights straight onto a device, one after another as from_pretrained and Trainer bring real ones there.

A model is built without them: its parameters on `meta`, its buffers with their values. Matrices are drawn from a normal
distribution of deviation 0.02, vectors are ones and biases zeros, so that a step computes finite numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from peftplan.job import Job
from peftplan.process import load_knobs

DEVIATION = 0.02
"""transformers' usual initializer_range."""
Pack = Callable[[str, torch.nn.Module], bool]
"""Whether it made the packed weight of a module, by its path."""


def unplaced() -> AbstractContextManager[None]:
    """Inside, parameters are made on `meta` and buffers where they are."""
    from accelerate import init_empty_weights

    empty: AbstractContextManager[None] = init_empty_weights(include_buffers=False)
    return empty


def fill(model: torch.nn.Module, place: torch.device, *, by_name: bool, pack: Pack | None = None) -> None:
    """Gives every parameter on `meta` random values on `place`; what is tied stays so.

    In the order of the modules, or `by_name` as from_pretrained takes weights up: the head first.
    """
    made: dict[int, torch.nn.Parameter] = {}
    for _, path, module, key in sorted(_slots(model), key=lambda slot: slot[0]) if by_name else _slots(model):
        param = module._parameters[key]
        if key == "weight" and pack is not None and pack(path, module):
            continue
        if param is not None and id(param) not in made:
            made[id(param)] = torch.nn.Parameter(drawn(param.data, place, key), param.requires_grad)
        module._parameters[key] = None if param is None else made[id(param)]
    bring(model, place)


def warm_up(model: Any, place: torch.device, job: Job, quantizer: Any = None) -> None:
    """What from_pretrained does before the first weight arrives: a block of the model's size, freed again."""
    if place.type == "cpu" or not load_knobs(job).warm_up:
        return
    from transformers.modeling_utils import caching_allocator_warmup

    caching_allocator_warmup(model, {name: place for name, _ in model.named_parameters()}, quantizer)


def _slots(model: torch.nn.Module) -> list[tuple[list[tuple[Any, ...]], str, torch.nn.Module, str]]:
    """(rank by name, path, module, key) of every parameter, tied ones at each of their places."""
    return [
        (_natural(f"{path}.{key}"), path, module, key)
        for path, module in model.named_modules()
        for key, param in module._parameters.items()
        if param is not None
    ]


def _natural(name: str) -> list[tuple[Any, ...]]:
    """`layers.2` before `layers.10` (transformers' dot_natural_key)."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def drawn(like: torch.Tensor, place: torch.device, key: str = "weight") -> torch.Tensor:
    """Random values for `like`, which is on `meta`; anything else as it is, on `place`."""
    if like.device.type != "meta":
        return like.to(place)
    made = torch.empty(like.shape, dtype=like.dtype, device=place)
    if like.dim() < 2:
        return made.zero_() if key == "bias" else made.fill_(1)
    return made.normal_(0, DEVIATION)


def bring(model: torch.nn.Module, place: torch.device) -> None:
    """Moves what is elsewhere: buffers, loose tensors, adapters made on the host."""
    for param in model.parameters():
        if param.device.type not in (place.type, "meta"):
            param.data = param.data.to(place)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(place)
    for _, owner, key, tensor in loose_tensors(model):
        if tensor.device.type not in (place.type, "meta"):
            owner[key] = tensor.to(place)


def loose_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Any, Any, torch.Tensor]]:
    """Tensors that modules hold as plain attributes, or in a dict or list: name, owner, key, tensor."""
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}", vars(module), name, value
            elif isinstance(value, (dict, list)) and name not in ("_parameters", "_buffers"):
                for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                    if isinstance(item, torch.Tensor):
                        yield f"{path}.{name}.{key}", value, key, item
