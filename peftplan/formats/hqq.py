"""Half-Quadratic Quantization: 8, 4, 3, 2 or 1 bits, a scale and a zero point per group (hqq's HQQLinear).

Mirrors hqq 0.2.8, core/quantize.py and core/bitpack.py, with its default PyTorch backend: rows of groups are packed
into bytes, 3-bit weights by ten into int32; scales and zeros are in the compute dtype. Forward and backward unpack the
whole weight in three steps; autograd keeps the layer's input, which backward never reads. The `quant_zero` and
`quant_scale` of older releases are ignored by this one.
hqq's AutoHQQHFModel and transformers' HqqConfig leave out lm_head alone; transformers 5.23.0 has no quantizing on the
fly for it. prepare_model_for_kbit_training turns gradient checkpointing on and casts nothing.
Not modelled: backends other than PyTorch, `dynamic_config`, trained biases (hqq's are no parameters).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.errors import RequestError, Unsupported
from peftplan.formats._kernel import Unpacking, packed_linear
from peftplan.formats._packing import pack
from peftplan.formats.base import Format, Piece
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.units import DType, ceil_div

PER_BYTE = {8: 1, 4: 2, 2: 4, 1: 8}
BITS = (8, 4, 3, 2, 1)


@final
@dataclass(frozen=True)
class Hqq(Format):
    """transformers' HqqConfig."""

    nbits: int = 4
    group_size: int | None = 64
    axis: int = 1
    view_as_float: bool = False
    """The same bytes seen as another dtype, for FSDP."""
    prepare: bool = False
    """Whether peft.prepare_model_for_kbit_training runs before the adapter is put on."""

    @property
    def packed(self) -> bool:
        return True

    @property
    def prepares(self) -> bool:
        return self.prepare

    def bias_dtype(self, compute: DType, rest: DType) -> DType:
        del rest
        return compute

    def groups(self, rows: int, columns: int) -> int:
        """How many groups a weight has. Raises RequestError where hqq does."""
        if self.nbits not in BITS:
            raise RequestError(f"format.nbits={self.nbits}: HqqConfig has {', '.join(map(str, BITS))}; use one of them")
        if self.axis not in (0, 1):
            raise RequestError(f"format.axis={self.axis}: hqq groups along axis 0 or 1; use one of them")
        size = self.group_size
        if size is None:
            return rows if self.axis == 1 else columns
        if size < 8 or size % 8:
            raise RequestError(f"format.group_size={size}: hqq needs a multiple of 8; use 64, for example")
        if rows * columns % size:
            raise RequestError(
                f"format.group_size={size} does not divide a weight of {rows}x{columns}, refused by hqq; use a divisor"
            )
        return rows * columns // size

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the packed weight. Raises RequestError where its groups do not fill whole bytes."""
        groups = self.groups(rows, columns)
        tall, wide = (groups, rows * columns // groups) if self.axis == 1 else (rows * columns // groups, groups)
        if self.nbits == 3:
            return 4 * ceil_div(tall, 10) * wide
        per = PER_BYTE[self.nbits]
        if tall % per:
            raise RequestError(
                f"format.nbits={self.nbits}: hqq packs {per} rows of groups at a time, and a {rows}x{columns} weight "
                f"has {tall}; use another format.group_size"
            )
        return rows * columns // per

    def stored_bytes(self, rows: int, columns: int, size: int) -> int:
        """Bytes of one packed weight with its constants, where a float of the compute dtype takes `size` bytes."""
        return self.packed_bytes(rows, columns) + 2 * size * self.groups(rows, columns)

    def pieces(self, weight: Tensor) -> tuple[Piece, ...]:
        """Quantizer.quantize: the weight in fp32 and three of its size while zeros are refined (core/optimize.py),
        then the packed weight, and fp32 constants that become half ones."""
        rows, columns = weight.shape
        wide, constants = Piece(4 * weight.numel, stays=False), 2 * self.groups(rows, columns)
        half = Piece(constants * weight.dtype.size)
        return wide, wide, wide, wide, Piece(self.packed_bytes(rows, columns)), half

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        def stand_in(module: Module) -> tuple[Op, ...]:
            return self._linear(module, numerics)

        del compute
        return pack(graph, stand_in)

    def _linear(self, module: Module, numerics: Numerics) -> tuple[Op, ...]:
        b, size = Builder(numerics, f"{module.path}."), module.weight.dtype.size
        inner = numerics.autocast or module.x.dtype
        if module.weight.dtype is not inner:
            raise Unsupported(
                f"hqq multiplies {inner.label} by {module.weight.dtype.label} in backward, which torch refuses; use "
                f"--dtype {inner.label}"
            )
        rows, columns = module.weight.shape
        weight = module.weight._replace(stored_bytes=self.stored_bytes(rows, columns, size), trainable=False)
        unpacking = self._unpacking(weight)
        cast = module.x.numel * inner.size if module.x.dtype is not inner else 0
        ahead = Unpacking(unpacking.peak_bytes, unpacking.kept_bytes + cast)
        with b.marked(module.site):
            out = packed_linear(
                b, module, weight, saves=("input",), layer="hqq", unpacking=(ahead, unpacking), dtype=inner,
                bias="in place",
            )  # fmt: skip
        return writing(b.ops, out, module.out)

    def _unpacking(self, weight: Tensor) -> Unpacking:
        """Unpacked (3 bits to whole tens of rows), less the zeros, times the scales; the last is what is multiplied."""
        whole = weight.logical_bytes
        unpacked = whole
        if self.nbits == 3:
            unpacked = self.packed_bytes(*weight.shape) // 4 * 10 * weight.dtype.size
        return Unpacking(unpacked + 2 * whole, whole)


FORMAT = Hqq
EXAMPLES = (Hqq(group_size=16), Hqq(nbits=3, group_size=16, axis=0, prepare=True), Hqq(nbits=8, group_size=None))
UNVERIFIED: dict[str, str] = {}
