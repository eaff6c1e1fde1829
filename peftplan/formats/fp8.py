"""Block-scaled float8 (DeepSeek-V3's checkpoints): e4m3 weights, an fp32 scale per 128x128 of them (FP8Linear).

Mirrors transformers 5.23.0, integrations/finegrained_fp8.py, as a checkpoint holds it: blocks at the edges count
whole. The backward unpacks the whole weight once, in place; autograd keeps the packed weight alone. FP8Linear is a
torch.nn.Linear to PEFT. The kernels run on GPUs of compute capability 8.9 and above; transformers unpacks the
model to bf16 elsewhere. From 9.0 on DeepGEMM takes activations quantized beforehand, Triton quantizes them in the
product; read, not measured.
Not modelled: `modules_to_convert`, experts, prepare_model_for_kbit_training (it would cast what is not packed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from peftplan.errors import RequestError
from peftplan.formats._kernel import Unpacking, packed_linear
from peftplan.formats._packing import pack
from peftplan.formats.base import Format, Piece
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import PLAIN
from peftplan.units import DType, ceil_div


@final
@dataclass(frozen=True)
class Fp8(Format):
    """transformers' FineGrainedFP8Config."""

    weight_block_size: tuple[int, int] | None = (128, 128)
    """None: one scale for the whole weight."""
    scale_fmt: Literal["float", "ue8m0"] = "float"
    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    """static: with one fp32 number more per layer."""

    @property
    def packed(self) -> bool:
        return True

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of one packed weight with its scales. Raises RequestError for blocks that are none."""
        static = 4 if self.activation_scheme == "static" else 0
        return rows * columns + self._scales(rows, columns) * (4 if self.scale_fmt == "float" else 1) + static

    def _scales(self, rows: int, columns: int) -> int:
        if self.weight_block_size is None:
            return 1
        tall, wide = self.weight_block_size
        if tall < 1 or wide < 1:
            raise RequestError(f"format.weight_block_size={tall},{wide}: both sides must be positive; use 128,128")
        return ceil_div(rows, tall) * ceil_div(columns, wide)

    def pieces(self, weight: Tensor) -> tuple[Piece, ...]:
        """Fp8Quantize: the weight in fp32, its absolutes, then the scaled and the clamped one, and float8."""
        rows, columns = weight.shape
        wide, scales = Piece(4 * weight.numel, stays=False), Piece(self.stored_bytes(rows, columns) - weight.numel)
        return wide, scales, wide, wide, Piece(weight.numel)

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        del compute
        too_old = numerics.capability is not None and numerics.capability < (8, 9)
        if too_old or numerics.backend == "cpu":
            raise RequestError(
                "--format fp8: transformers has float8 kernels from compute capability 8.9 on, and makes the model "
                "bf16 here; use --format bf16"
            )

        def stand_in(module: Module) -> tuple[Op, ...]:
            return self.linear(module, numerics)

        return pack(graph, stand_in)

    def linear(self, module: Module, numerics: Numerics) -> tuple[Op, ...]:
        """The ops of FP8Linear."""
        b, (rows, columns) = Builder(numerics, f"{module.path}."), module.weight.shape
        weight = module.weight._replace(stored_bytes=self.stored_bytes(rows, columns), trainable=False)
        tokens = module.x.numel // columns
        newest = numerics.capability is None or numerics.capability >= (9, 0)
        given = module.x.numel + 4 * tokens * ceil_div(columns, 128) if newest and numerics.backend == "cuda" else 0
        size = module.x.dtype.size
        spread = size * rows * ceil_div(columns, self.weight_block_size[1]) if self.weight_block_size else size
        whole = weight.numel * size
        both = Unpacking(given, given), Unpacking(whole + spread, whole)
        with b.marked(module.site):
            out = packed_linear(b, module, weight, saves=("weight",), layer=PLAIN, unpacking=both, bias="in place")
        return writing(b.ops, out, module.out)


FORMAT = Fp8
EXAMPLES = (Fp8(), Fp8(weight_block_size=None, activation_scheme="static"), Fp8(scale_fmt="ue8m0"))
UNVERIFIED: dict[str, str] = {}
