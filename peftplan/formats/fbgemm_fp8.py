"""float8 per row of FBGEMM (transformers' FbgemmFp8Config): one byte a weight and an fp32 scale per row.

Mirrors transformers 5.23.0, integrations/fbgemm_fp8.py, FbgemmFp8Linear: an fp32 bound of the input's scales per layer,
and biases in fp32. Nothing trains on it: its quantizer says so, and Trainer refuses the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.formats._kernel import Unpacking, packed_linear
from peftplan.formats._packing import pack
from peftplan.formats.base import Format
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import PLAIN
from peftplan.units import DType


@final
@dataclass(frozen=True)
class FbgemmFp8(Format):
    untrainable: ClassVar[str] = (
        "transformers trains nothing on FBGEMM's float8 (its quantizer's is_trainable); use fp8 or torchao_float8"
    )

    @property
    def packed(self) -> bool:
        return True

    def bias_dtype(self, compute: DType, rest: DType) -> DType:
        del compute, rest
        return DType.float32

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of one packed weight with its scales and the layer's bound."""
        return rows * columns + 4 * rows + 4

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        del compute

        def stand_in(module: Module) -> tuple[Op, ...]:
            b, (rows, columns) = Builder(numerics, f"{module.path}."), module.weight.shape
            weight = module.weight._replace(stored_bytes=self.stored_bytes(rows, columns), trainable=False)
            quantized = module.x.numel + 4 * module.x.numel // columns
            work = Unpacking(quantized, quantized)
            with b.marked(module.site):
                out = packed_linear(b, module, weight, saves=(), layer=PLAIN, unpacking=(work, work))
            return writing(b.ops, out, module.out)

        return pack(graph, stand_in)


FORMAT = FbgemmFp8
EXAMPLES = (FbgemmFp8(),)
UNVERIFIED: dict[str, str] = {}
