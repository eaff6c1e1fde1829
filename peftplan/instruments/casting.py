"""The dtype that an adapter has after loading on a real device, given to one that was made on `meta`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

UNRAISED = ("_psoft_A_cache", "_psoft_B_cache", "frod_U", "frod_V")
"""Buffers that PEFT does not leave in float32 where it raises half precision: PSOFT makes its own after that, in
float32 already; FRoD's model gives them the base's dtype again (frod/model.py, _cast_adapter_dtype)."""


def cast_adapter(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Give the adapter the dtype it has after loading on a real device.

    PEFT skips its casts for adapters on `meta`: to the base weight's dtype, then half precision up to float32
    (`peft.tuners.tuners_utils.cast_adapter_dtype`). None does the second; a dtype asks for that one.
    """

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.to(dtype or torch.float32) if half or (dtype and tensor.is_floating_point()) else tensor

    for param in _adapter_parameters(model):
        param.data = cast(param.data)
    for part in _adapter_buffers(model):
        part.update({key: cast(tensor) for key, tensor in part.items()})


def _adapter_buffers(model: torch.nn.Module) -> Iterator[Any]:
    """What layers keep beside their parameters goes with them (`_move_adapter_to_device_of_base_layer`)."""
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in module.other_param_names:
                part = getattr(module, name, None)
                if isinstance(part, BufferDict) and name not in UNRAISED:
                    yield part


def _adapter_parameters(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name in (*module.adapter_layer_names, *module.other_param_names):
                part = getattr(module, name, None)
                if isinstance(part, torch.nn.Module):
                    yield from part.parameters()
