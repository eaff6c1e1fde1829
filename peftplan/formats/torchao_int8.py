"""int8 of torchao: one byte a weight, an fp32 scale and an int8 zero point per row (Int8WeightOnlyConfig).

With `activations=dynamic`, Int8DynamicActivationInt8WeightConfig: the same bytes, and a product in int8.
Mirrors torchao 0.18.0, workflows/int8/int8_tensor.py: symmetric quantization has a zero point all the same; weights
alone are cast to the input's dtype, multiplied, and the product is scaled. Autograd keeps the cast weight.
Not modelled: asymmetric activations; bitsandbytes' LLM.int8 is `int8`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.formats._packing import biases
from peftplan.formats._torchao import TorchAo8
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Grad, Tensor
from peftplan.graph.edit import Module
from peftplan.units import DType


@final
@dataclass(frozen=True)
class TorchaoInt8(TorchAo8):
    constant_bytes: ClassVar[int] = 5

    def opaque(self, numerics: Numerics) -> bool:
        """What comes out has the dtype of what went in, whatever autocast multiplied in."""
        del numerics
        return True

    def weight_only(self, b: Builder, module: Module, weight: Tensor) -> Tensor:
        x = module.x
        if self.group_size is not None and self.group_size < weight.shape[1]:
            out = b.linear(x, _grouped(b, weight, x.dtype), label="product")
        else:
            wide = b.plain("widened", *weight.shape, dtype=x.dtype, ins=(weight,))
            product = b.linear(x, wide, label="product")
            out = b.mul(product, self._scales(b, weight, product.dtype), label="scaled")
        for bias in biases(module):
            out = _add_bias(b, out, bias)
        return b.cast(out, x.dtype, label="out")

    def dynamic_bytes(self, tokens: int, rows: int, columns: int, b: Builder) -> int:
        """Activations are scaled and rounded in fp32, two copies at a time. Their int32 product is scaled in fp32 and
        cast; that times the weights' scales is fp32 again, and cast. A CPU with VNNI takes uint8 activations, made
        through int32, and sums the weight's columns; an older one does not, so its temporaries err high."""
        given, product, scales = tokens * columns, tokens * rows, 5 * tokens
        size = b.numerics.autocast.size if b.numerics.autocast is not None else 2
        if b.numerics.backend == "cpu":
            phases = (9 * given, 2 * given + 12 * product + 4 * rows)
        else:
            phases = (8 * given, given + 8 * product)
        before = max(phases) + scales - size * product
        return max(before, given + scales + (size + 4) * product)

    def _scales(self, b: Builder, weight: Tensor, dtype: DType) -> Tensor:
        count = self.constants(*weight.shape)
        if dtype is DType.float32:
            return b.alias(weight).view(count)
        return b.plain("scales", count, dtype=dtype, ins=(weight,))


def _grouped(b: Builder, weight: Tensor, dtype: DType) -> Tensor:
    """dequantize_affine: cast, less the zero point, times the scale in fp32, and cast."""
    cast = b.plain("widened", *weight.shape, dtype=weight.dtype, ins=(weight,))
    centred = b.plain("centred", *weight.shape, dtype=weight.dtype, ins=(weight, cast))
    whole = b.plain("dequantized", *weight.shape, dtype=DType.float32, ins=(weight, centred))
    for target in (weight.dtype, dtype):
        if target is not whole.dtype:
            whole = b.plain("dequantized_cast", *weight.shape, dtype=target, ins=(whole,))
    return whole


def _add_bias(b: Builder, out: Tensor, bias: Tensor) -> Tensor:
    """`y += bias` on a view of the scaled product: autograd copies the gradient for the view, twice for the sum, and
    sums it for the bias, whoever needs that (CopySlices; as_strided_backward)."""
    grads = (Grad(bias, bias.logical_bytes), Grad(out, out.logical_bytes, out.logical_bytes + bias.logical_bytes))
    total = b.formula("biased", out._replace(base=out.storage), out, bias, grads=grads)
    return b.view(total, label="biased_view", grad_copied=True)


FORMAT = TorchaoInt8
EXAMPLES = (TorchaoInt8(), TorchaoInt8(granularity="tensor", prepare=True), TorchaoInt8(group_size=8))
UNVERIFIED: dict[str, str] = {}
