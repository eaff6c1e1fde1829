"""float8 of torchao: e4m3, one byte a weight and an fp32 scale per row (Float8WeightOnlyConfig).

With `activations=dynamic`, Float8DynamicActivationFloat8WeightConfig: the same bytes, and a product in float8.
Mirrors torchao 0.18.0, workflows/float8/float8_tensor.py: weights alone are unpacked to fp32, scaled and cast to the
model's dtype, and autograd keeps the cast one. Dynamic activations need a GPU of compute capability 8.9
(float8/inference.py, _check_hardware_support); their temporaries are read, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.formats._packing import biases
from peftplan.formats._torchao import TorchAo8
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Tensor
from peftplan.graph.edit import Module
from peftplan.units import DType


@final
@dataclass(frozen=True)
class TorchaoFloat8(TorchAo8):
    constant_bytes: ClassVar[int] = 4

    def opaque(self, numerics: Numerics) -> bool:
        """Autocast reaches the product of unpacked weights, and no other."""
        del numerics
        return self.cuts

    def check(self, numerics: Numerics) -> None:
        too_old = numerics.capability is not None and numerics.capability < (8, 9)
        if self.cuts and (too_old or numerics.backend == "cpu"):
            raise RequestError(
                "format.activations=dynamic: torchao multiplies in float8 on GPUs of compute capability 8.9 and above "
                "only; leave it out"
            )

    def weight_only(self, b: Builder, module: Module, weight: Tensor) -> Tensor:
        wide = b.plain("widened", *weight.shape, dtype=DType.float32, ins=(weight,))
        whole = b.plain("dequantized", *weight.shape, dtype=DType.float32, ins=(wide, weight))
        if weight.dtype is not DType.float32:
            whole = b.plain("dequantized_cast", *weight.shape, dtype=weight.dtype, ins=(whole,))
        b.hold(wide)
        out = b.linear(module.x, whole, label="product")
        for bias in biases(module):
            out = b.add(out, bias, label="biased")
        return out

    def dynamic_bytes(self, tokens: int, rows: int, columns: int, b: Builder) -> int:
        """Rows are widened, scaled and clamped in fp32, all three alive together, before they are float8; the product
        writes its output at once."""
        del b
        given = tokens * columns
        return max(12 * given - 2 * tokens * rows, given + 4 * tokens)


FORMAT = TorchaoFloat8
EXAMPLES = (TorchaoFloat8(), TorchaoFloat8(granularity="tensor", prepare=True), TorchaoFloat8(activations="dynamic"))
UNVERIFIED: dict[str, str] = {}
