"""A host beside the device, where the CPU is the device: copies that the recorder does not see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

Pack = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def activations(model: torch.nn.Module, stay: Pack, *, least_bytes: int) -> Iterator[None]:
    """TRL's OffloadActivations without streams: all that is saved goes to the host, but parameters, what is smaller
    than `least_bytes` and what the head saves. `stay` packs what stays."""
    owned = {param.untyped_storage()._cdata for param in model.parameters()}
    in_head = False

    def pack(tensor: torch.Tensor) -> tuple[bool, torch.Tensor]:
        small = tensor.element_size() * tensor.nelement() < least_bytes
        if small or in_head or tensor.untyped_storage()._cdata in owned:
            return False, stay(tensor)
        with _disable_current_modes(), torch.no_grad():
            return True, tensor.clone()

    def unpack(packed: tuple[bool, torch.Tensor]) -> torch.Tensor:
        return packed[1].clone() if packed[0] else packed[1]

    def enter(*_: object) -> None:
        nonlocal in_head
        in_head = True

    def leave(*_: object) -> None:
        nonlocal in_head
        in_head = False

    heads = [module for name, module in model.named_modules() if name.endswith("lm_head")]
    handles = [head.register_forward_pre_hook(enter) for head in heads]
    handles += [head.register_forward_hook(leave) for head in heads]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


def saved() -> torch.autograd.graph.saved_tensors_hooks:
    """torch.autograd.graph.save_on_cpu: what is saved for backward is copied to the host, and back when asked for."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes(), torch.no_grad():
            return tensor.clone()

    def unpack(held: torch.Tensor) -> torch.Tensor:
        return held.clone()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
