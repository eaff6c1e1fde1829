"""What torch's autograd engine does when nobody watches: it works in place.

`InputBuffer::accumulate` (torch/csrc/autograd/input_buffer.cpp) adds into the gradient it holds if that is
dense and its own alone, but makes a new tensor while any dispatch mode is on (`isTensorSubclassLike` in
ATen/TensorSubclassLikeUtils.h). So do `index_backward` and `value_selecting_reduction_backward`
(torch/csrc/autograd/FunctionsManual.cpp), which fill zeros of their own. A trace needs a mode, so it would see a tensor
too many where gradients meet or are put in their places.
"""

from __future__ import annotations

import functools
import sys
from types import FrameType
from typing import Any

import torch
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.utils._python_dispatch import TorchDispatchMode

from peftplan.errors import OutsideError

_ADD = torch.ops.aten.add.Tensor
_FILLS: dict[Any, Any] = {
    torch.ops.aten.index_put.default: torch.ops.aten.index_put_.default,
    torch.ops.aten.scatter.src: torch.ops.aten.scatter_.src,
}
_LINEAR = "torch/nn/modules/linear.py"
_WRAPPERS = ("torch/_compile.py", "torch/_dynamo/eval_frame.py", "torch/utils/_python_dispatch.py")


def sums_in_place(func: Any, args: Any) -> bool:
    """Whether this call, in a `__torch_dispatch__`, is a sum of the engine's that unwatched is in place."""
    if func is not _ADD or torch.is_grad_enabled() or not _called_by_engine():
        return False
    held = args[0]
    return owners(held) == sole_owner() and bool(is_non_overlapping_and_dense_or_false(held))


def filling_in_place(func: Any) -> Any:
    """What this call, in a `__torch_dispatch__`, is unwatched if it is the engine's that fills new zeros; else None."""
    filled = _FILLS.get(func)
    return filled if filled is not None and not torch.is_grad_enabled() and _called_by_engine() else None


def adds_bias(func: Any, args: Any) -> bool:
    """Whether this call, in a `__torch_dispatch__`, is a linear layer's sum with its bias that unwatched is in place:
    of an input that is not contiguous (aten/src/ATen/native/Linear.cpp, linear), for the same reason."""
    return func is _ADD and isinstance(args[1], torch.Tensor) and args[1].dim() == 1 and _caller().endswith(_LINEAR)


def owners(tensor: torch.Tensor) -> tuple[int, int]:
    """References to a tensor and to its storage, those of the current call included."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _called_by_engine() -> bool:
    return _frame(4).f_code.co_name == "_engine_run_backward"


def _caller() -> str:
    return _frame(4).f_code.co_filename


def _frame(depth: int) -> FrameType:
    """Who called the operator, torch's wrappers of modes left out."""
    frame = sys._getframe(depth)
    while frame.f_code.co_filename.endswith(_WRAPPERS):
        frame = frame.f_back  # type: ignore[assignment]
    return frame


class _Probe(TorchDispatchMode):  # type: ignore[misc]
    seen: tuple[int, int] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ADD and not torch.is_grad_enabled():
            held = args[0]
            self.seen = owners(held)
        return func(*args, **(kwargs or {}))


@functools.cache
def sole_owner() -> tuple[int, int]:
    """What `owners` says of a gradient that only the engine holds: measured on one, as it varies with torch.

    Call it first where no other mode is on.
    """
    with _Probe() as probe:
        leaf = torch.zeros(2, requires_grad=True)
        torch.autograd.backward((leaf.sin() + leaf.cos()).sum())
    seen: tuple[int, int] | None = probe.seen
    if seen is None:
        raise OutsideError(f"torch {torch.__version__}: the autograd engine sums gradients in an unknown way")
    return seen
