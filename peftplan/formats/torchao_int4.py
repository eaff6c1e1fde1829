"""int4 of torchao (Int4WeightOnlyConfig): two weights a byte, scale and zero point per group in the weight's dtype.

Mirrors torchao 0.18.0, quantization/quant_api.py and workflows/int4, every packing format: `plain`, `preshuffled` and
`plain_int32` are of one size; `tile_packed_to_4d` (tinygemm) pads inputs to 1024 and outputs to 8 or 16. Weights whose
inputs are no whole number of groups stay as they are.
Nothing trains on it: transformers takes torchao's 8-bit configs alone for trainable, and PEFT refuses an Int4Tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError
from peftplan.formats._kernel import Unpacking, packed_linear
from peftplan.formats._packing import pack
from peftplan.formats.base import Format
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import PLAIN
from peftplan.units import DType, ceil_div


@final
@dataclass(frozen=True)
class TorchaoInt4(Format):
    """torchao's Int4WeightOnlyConfig."""

    group_size: int = 128
    int4_packing_format: Literal["plain", "preshuffled", "plain_int32", "tile_packed_to_4d"] = "plain"
    int4_tile_packed_ntile: int = 8
    untrainable: ClassVar[str] = (
        "transformers trains nothing on torchao's int4 (quantizer_torchao.py, is_trainable; lora/torchao.py: only int8 "
        "weights are supported); use torchao_int8, torchao_nf4 or nf4"
    )

    @property
    def packed(self) -> bool:
        return True

    def stored_bytes(self, rows: int, columns: int, size: int = 2) -> int:
        """Bytes of one packed weight with its constants, where a float of its dtype takes `size` bytes."""
        if self.group_size < 2 or self.group_size % 2:
            raise RequestError(f"format.group_size={self.group_size}: torchao has 32, 64, 128 and 256; use one of them")
        if self.int4_tile_packed_ntile not in (8, 16):
            raise RequestError(f"format.int4_tile_packed_ntile={self.int4_tile_packed_ntile}: use 8 or 16; 8 is CUDA's")
        if columns % self.group_size:
            return rows * columns * size
        if self.int4_packing_format == "tile_packed_to_4d":
            columns = 1024 * ceil_div(columns, 1024)
            rows = self.int4_tile_packed_ntile * ceil_div(rows, self.int4_tile_packed_ntile)
        return rows * columns // 2 + 2 * size * rows * (columns // self.group_size)

    def expected_bytes(self, numel: int) -> int:
        return numel // 2

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        del compute

        def stand_in(module: Module) -> tuple[Op, ...]:
            b, (rows, columns) = Builder(numerics, f"{module.path}."), module.weight.shape
            if columns % self.group_size == 0:
                stored = self.stored_bytes(rows, columns, module.weight.dtype.size)
                weight = module.weight._replace(stored_bytes=stored, trainable=False)
                work = Unpacking(0, 0)
                with b.marked(module.site):
                    out = packed_linear(b, module, weight, saves=(), layer=PLAIN, unpacking=(work, work))
                return writing(b.ops, out, module.out)
            return module.ops

        return pack(graph, stand_in)


FORMAT = TorchaoInt4
EXAMPLES = (TorchaoInt4(), TorchaoInt4(group_size=32, int4_packing_format="tile_packed_to_4d"))
UNVERIFIED: dict[str, str] = {}
