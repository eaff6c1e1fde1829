"""Casts, copies and views: the same values in another dtype, place or order."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Grad, Need, Op
from peftplan.graph.ops.shapes import HandsOn, Unary, handed_on, made
from peftplan.units import DType


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Cast(Unary):
    """`.to(dtype)`: a new tensor, keeps nothing; the gradient is cast back."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class WeightCast(Unary):
    """Autocast's copy of a weight. Of a trained fp32 weight it is cached until autocast ends with the forward
    (aten/src/ATen/autocast_mode.cpp, cached_cast: fp32 leaves that require a gradient)."""

    @property
    def cached(self) -> bool:
        weight = self.ins[0]
        return weight.trainable and weight.dtype is DType.float32


@dataclass(frozen=True, kw_only=True, slots=True)
class _Moves(Op, ABC):
    """Keeps nothing. `grad_copied` says whether the gradient is made anew (a sum over repeats, a copy) or handed on
    as a view."""

    grad_copied: bool = False

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return made(self.ins, need) if self.grad_copied else handed_on(self.ins, need)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Copy(_Moves):
    """A contiguous copy (clone, cat of one, repeat_kv's reshape)."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class View(_Moves):
    """A view of another layout: no bytes forward; `grad_copied` where its gradient comes back non-contiguous."""

    views = True

    def moved_bytes(self) -> int:
        return 0


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Slice(Unary):
    """A narrow view of a larger tensor; its backward pads the gradient to the whole (slice_backward)."""

    def moved_bytes(self) -> int:
        return 0


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Part(HandsOn):
    """One of the results of torch.split: a view. The gradients of all of them stay as they are until the last has
    come, and are then concatenated (SplitWithSizesBackward); which is how views that meet are added up."""

    views = True
    narrows = True

    def moved_bytes(self) -> int:
        return 0


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Concat(HandsOn):
    """torch.cat: keeps nothing; gradients are views of the incoming one."""

    narrows = True


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Flattened(HandsOn):
    """Parameters in one buffer, seen as one (nn.LSTM.flatten_parameters): no bytes forward; their gradients are views
    of one."""

    narrows = True

    def moved_bytes(self) -> int:
        return 0


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class RotateHalf(Unary):
    """cat(-x2, x1) over the last dimension: half of x as a temporary, keeps nothing.

    Backward: two slice_backward tensors of x's size, added up.
    """

    def scratch_bytes(self) -> int:
        return self.out.nbytes // 2

    def grad_scratch_bytes(self) -> int:
        return self.ins[0].nbytes
