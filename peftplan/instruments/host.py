"""A host beside the device, where the CPU is the device: copies that the recorder does not see."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes


def saved() -> torch.autograd.graph.saved_tensors_hooks:
    """torch.autograd.graph.save_on_cpu: what is saved for backward is copied to the host, and back when asked for."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes(), torch.no_grad():
            return tensor.clone()

    def unpack(held: torch.Tensor) -> torch.Tensor:
        return held.clone()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
