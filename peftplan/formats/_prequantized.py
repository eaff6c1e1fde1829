"""Weights that a checkpoint holds packed: they arrive as they are stored, and nobody packs them on the device."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

from peftplan.formats._packing import biases
from peftplan.formats.base import Format
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Grad, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import Unpack
from peftplan.units import DType


@dataclass(frozen=True)
class Prequantized(Format, ABC):
    """`pieces` say what is stored."""

    @property
    def packed(self) -> bool:
        return True

    @property
    def arrives_packed(self) -> bool:
        return True

    def opaque(self, numerics: Numerics) -> bool:
        del numerics
        return False

    def file_bytes(self, weight: Tensor) -> int:
        """What a checkpoint holds of a weight."""
        return sum(piece.bytes for piece in self.pieces(weight) if piece.stays)

    def stored(self, weight: Tensor) -> Tensor:
        """The weight as it is held."""
        return weight._replace(stored_bytes=sum(p.bytes for p in self.pieces(weight) if p.stays), trainable=False)


def unpacked_linear(
    module: Module, numerics: Numerics, *, weight: Tensor, made: DType, temporary_bytes: int, layer: str
) -> tuple[Op, ...]:
    """y = torch.matmul(x, unpack(W)) (+ b in place): the copy in `made` is cast to x's dtype, and autograd keeps it."""
    b = Builder(numerics, f"{module.path}.packed.")
    x = module.x
    with b.marked(module.site):
        name = b.name("unpacked")
        out = Tensor(name, weight.shape, made)
        b.ops.append(
            Unpack(name=name, ins=(weight,), out=out, site=module.site, temporary_bytes=temporary_bytes,
                   layer=layer)
        )  # fmt: skip
        y = b.linear(x, b.cast(out, x.dtype, label="unpacked_cast"), label="matmul")
        for bias in biases(module):
            y = _added_to_view(b, y, b.cast(bias, y.dtype, label="bias_cast"))
    return writing(b.ops, y, module.out)


def _added_to_view(b: Builder, y: Tensor, bias: Tensor) -> Tensor:
    """`y.add_(bias)` where y views another tensor: the gradient is copied into that one's shape, and the part that the
    view is of cloned (torch/csrc/autograd/functions/tensor.cpp, CopySlices::apply_impl)."""
    return b.formula("biased", y._replace(base=y.storage), y, bias, grads=(Grad(y, y.nbytes, y.nbytes),))
