"""optimum-quanto: int8, int4, int2 or float8 weights with a scale per row or per group of 128 (quanto's QLinear).

Mirrors optimum-quanto 0.2.7, nn/qmodule.py and tensor/weights: 8-bit weights have a scale per row, 4- and 2-bit ones
scale and shift per group (groups of 128, 96, 64 or 32 inputs, the largest that divides them; per row where they are
128 or fewer, or none does), in the weight's dtype; each layer has two fp32 numbers more (input and output scale).
Autograd keeps the layer's input besides the packed weight, which is unpacked whole in backward. int4 in bf16 on a GPU
from Ampere on is tinygemm's layout, of equal size, whose backward unpacks by multiplying identity matrices.
QLinear is a torch.nn.Linear to PEFT. prepare_model_for_kbit_training would cast the packed weights, which quanto
refuses. transformers leaves out the head and tied weights.
Not modelled: the kernels of quanto's CUDA extension for fp16 int4 (AWQ) and float8 (Marlin, whose layout also holds a
small workspace per layer), quantized activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from peftplan.errors import RequestError, Unsupported
from peftplan.formats._kernel import Unpacking, packed_linear
from peftplan.formats._packing import pack
from peftplan.formats.base import Format, Piece
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import PLAIN
from peftplan.units import DType, ceil_div

BITS = {"int8": 8, "float8": 8, "int4": 4, "int2": 2}


@final
@dataclass(frozen=True)
class Quanto(Format):
    """transformers' QuantoConfig."""

    weights: Literal["int8", "float8", "int4", "int2"] = "int8"
    prepare: bool = False
    """Whether peft.prepare_model_for_kbit_training is to run, which fails."""

    @property
    def packed(self) -> bool:
        return True

    @property
    def bits(self) -> int:
        return BITS[self.weights]

    def opaque(self, numerics: Numerics) -> bool:
        """Whether the product's dtype is that of the scales: of 8-bit weights; autocast reaches the others'."""
        del numerics
        return True

    def group_size(self, columns: int) -> int | None:
        """QModuleMixin.__init__: None where scales are per row."""
        if self.bits == 8 or columns <= 128:
            return None
        return next((size for size in (128, 96, 64, 32) if columns % size == 0), None)

    def stored_bytes(self, rows: int, columns: int, size: int) -> int:
        """Bytes of one packed weight, its constants and the layer's two scales, where floats take `size` bytes."""
        return self._data_bytes(rows, columns) + self._constant_bytes(rows, columns, size) + 2 * 4

    def _data_bytes(self, rows: int, columns: int) -> int:
        group = self.group_size(columns)
        tall, wide = (rows, columns) if group is None else (rows * columns // group, group)
        return ceil_div(tall, 8 // self.bits) * wide

    def _constant_bytes(self, rows: int, columns: int, size: int) -> int:
        group = self.group_size(columns)
        count = rows if group is None else rows * columns // group
        return count * size * (1 if self.bits == 8 else 2)

    def pieces(self, weight: Tensor) -> tuple[Piece, ...]:
        """The weight over its scales and rounded, then the packed weight (a byte a weight before it is packed)."""
        rows, columns = weight.shape
        wide, constants = (
            Piece(weight.logical_bytes, stays=False),
            self._constant_bytes(rows, columns, weight.dtype.size),
        )
        data = Piece(self._data_bytes(rows, columns))
        if self.bits == 8:
            return Piece(constants), wide, wide, data
        return Piece(constants), wide, wide, Piece(weight.numel, stays=False), data

    def expected_bytes(self, numel: int) -> int:
        return numel * self.bits // 8

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        del compute
        if self.prepare:
            raise RequestError(
                "format.prepare=true: prepare_model_for_kbit_training casts all weights, and quanto refuses that for "
                "packed ones; leave it out"
            )
        if numerics.autocast is not None:
            raise Unsupported("quanto under autocast is not modelled; use --precision bf16, or another --format")

        def stand_in(module: Module) -> tuple[Op, ...]:
            b, (rows, columns) = Builder(numerics, f"{module.path}."), module.weight.shape
            stored = self.stored_bytes(rows, columns, module.weight.dtype.size)
            weight = module.weight._replace(stored_bytes=stored, trainable=False)
            both = self._forward(weight, numerics), self._backward(weight, numerics)
            with b.marked(module.site):
                out = packed_linear(b, module, weight, saves=("input", "weight"), layer=PLAIN, unpacking=both)
            return writing(b.ops, out, module.out)

        return pack(graph, stand_in)

    def _forward(self, weight: Tensor, numerics: Numerics) -> Unpacking:
        """Nothing where a kernel takes packed weights."""
        on_cpu, half = numerics.backend == "cpu", weight.dtype is DType.bfloat16
        direct = on_cpu and half and self.weights == "int8" and weight.shape[1] % 4 == 0
        return Unpacking(0, 0) if direct or self._tinygemm(weight, numerics) else self._dequantized(weight)

    def _backward(self, weight: Tensor, numerics: Numerics) -> Unpacking:
        if not self._tinygemm(weight, numerics):
            return self._dequantized(weight)
        # Multiplied out in bf16 by identities, block by block; whole numbers of it, and then packed as others are.
        unpacked = weight.numel
        return Unpacking(max(4 * weight.numel, 2 * unpacked + weight.logical_bytes), weight.logical_bytes)

    def _tinygemm(self, weight: Tensor, numerics: Numerics) -> bool:
        """WeightQBitsTensor.create."""
        modern = numerics.backend == "cpu" or numerics.capability is None or numerics.capability >= (8, 0)
        half = weight.dtype is DType.bfloat16
        return self.weights == "int4" and half and modern and self.group_size(weight.shape[1]) == 128

    def _dequantized(self, weight: Tensor) -> Unpacking:
        """Bytes are multiplied by scales; float8 is widened first, fewer bits are unpacked to bytes."""
        whole = weight.logical_bytes
        before = {"int8": 0, "float8": whole}.get(self.weights, weight.numel)
        return Unpacking(before + whole, whole)


FORMAT = Quanto
EXAMPLES = (Quanto(), Quanto(weights="float8"), Quanto(weights="int4"), Quanto(weights="int2"))
UNVERIFIED: dict[str, str] = {}
