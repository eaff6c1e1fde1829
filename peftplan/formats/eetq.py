"""EETQ: int8 weights with an fp16 scale per output (transformers' EetqLinear).

Mirrors transformers 5.23.0, integrations/eetq.py: autograd keeps the layer's input besides the packed weight;
backward unpacks the weight by multiplying an identity matrix, which is made on the CPU in fp32. Biases are fp16, and
so should the model be: the kernels take bf16 for it, without a word. PEFT's LoRA alone has a layer for it.
prepare_model_for_kbit_training turns gradient checkpointing on and casts nothing. The kernels run on GPUs only: what
is said of them is read, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.errors import RequestError
from peftplan.formats._kernel import Unpacking, packed_linear
from peftplan.formats._packing import biases, pack
from peftplan.formats.base import Format, Piece
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.units import DType


@final
@dataclass(frozen=True)
class Eetq(Format):
    """transformers' EetqConfig."""

    prepare: bool = False
    """Whether peft.prepare_model_for_kbit_training runs before the adapter is put on."""

    @property
    def packed(self) -> bool:
        return True

    @property
    def prepares(self) -> bool:
        return self.prepare

    def bias_dtype(self, compute: DType, rest: DType) -> DType:
        del compute, rest
        return DType.float16

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of one packed weight with its scales."""
        return rows * columns + 2 * rows

    def pieces(self, weight: Tensor) -> tuple[Piece, ...]:
        """EetqQuantize: the transposed weight, laid out anew; what is packed comes back from the CPU."""
        return Piece(weight.logical_bytes, stays=False), Piece(weight.numel), Piece(2 * weight.shape[0])

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        del compute
        if numerics.backend == "cpu":
            raise RequestError("--format eetq: transformers quantizes with EETQ on a GPU only; use --backend cuda")

        def stand_in(module: Module) -> tuple[Op, ...]:
            return self.linear(module, numerics)

        return pack(graph, stand_in)

    def linear(self, module: Module, numerics: Numerics) -> tuple[Op, ...]:
        """The ops of EetqLinear."""
        given = module.x.dtype
        if not given.is_half or (given is not DType.float16 and biases(module)):
            raise RequestError(f"--format eetq: its kernels read float16, not {given.label}; use --precision fp16")
        b, (rows, columns) = Builder(numerics, f"{module.path}."), module.weight.shape
        weight = module.weight._replace(stored_bytes=self.stored_bytes(rows, columns), trainable=False)
        identity, whole = columns * columns, weight.numel * 2
        back = max(6 * identity, 2 * identity + whole)
        several = module.x.nbytes if module.x.shape[0] > 1 else 0  # a leading dimension too many, summed away
        both = Unpacking(0, 0), Unpacking(back, 2 * identity + whole + several)
        with b.marked(module.site):
            out = packed_linear(b, module, weight, saves=("input", "weight"), layer="eetq", unpacking=both)
        return writing(b.ops, out, module.out)


FORMAT = Eetq
EXAMPLES = (Eetq(), Eetq(prepare=True))
UNVERIFIED: dict[str, str] = {}
