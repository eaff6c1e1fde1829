"""AQLM: groups of inputs as sums of entries of learned codebooks (Egiazarian 2024, arXiv:2401.06118).

Storage (aqlm 1.1.7, inference.py, QuantizedLinear): a code of `nbits_per_codebook` for every group and codebook, in
whole bytes; the codebooks, one set for each layer; a scale for every group of outputs, both in the model's dtype.
Compute (the same file, _QuantizedMatmul; inference_kernels/cuda_kernel.cpp): above 6 rows, forward and backward unpack
the weight and drop it; autograd is given the input to keep, which backward does not read.
peft 0.21.2, utils/other.py, prepare_model_for_kbit_training casts nothing of an AQLM model and turns checkpointing on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.errors import RequestError
from peftplan.formats._packing import biases, pack
from peftplan.formats._prequantized import Prequantized
from peftplan.formats.base import Piece
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import PackedLinear
from peftplan.units import DType

_CODE_BYTES = ((8, 1), (16, 2), (32, 4), (64, 8))


@final
@dataclass(frozen=True)
class Aqlm(Prequantized):
    """Knobs of transformers' AqlmConfig: 1x16 as they stand, 2x8 with two codebooks of 8 bits."""

    in_group_size: int = 8
    out_group_size: int = 1
    num_codebooks: int = 1
    nbits_per_codebook: int = 16
    prepare: bool = True
    """Whether peft.prepare_model_for_kbit_training runs before the adapter is put on: it turns checkpointing on."""

    @property
    def prepares(self) -> bool:
        return self.prepare

    def opaque(self, numerics: Numerics) -> bool:
        del numerics
        return True

    def pieces(self, weight: Tensor) -> tuple[Piece, ...]:
        """In the order of their names: codebooks, codes, scales."""
        rows, columns = weight.shape
        groups = (rows // self.out_group_size) * (columns // self.in_group_size)
        entry = self.out_group_size * self.in_group_size * weight.dtype.size
        code = next(size for bits, size in _CODE_BYTES if self.nbits_per_codebook <= bits)
        return (
            Piece(self.num_codebooks * 2**self.nbits_per_codebook * entry),
            Piece(groups * self.num_codebooks * code),
            Piece(rows // self.out_group_size * weight.dtype.size),
        )

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        del compute
        if not 1 <= self.nbits_per_codebook <= 64 or min(self.num_codebooks, self.in_group_size) < 1:
            raise RequestError(
                f"format.nbits_per_codebook={self.nbits_per_codebook}, num_codebooks={self.num_codebooks}: give 1 to "
                "64 bits and at least one codebook"
            )

        def stand_in(module: Module) -> tuple[Op, ...]:
            return self._linear(module, numerics)

        return pack(graph, stand_in)

    def _linear(self, module: Module, numerics: Numerics) -> tuple[Op, ...]:
        self._check(module)
        b = Builder(numerics, f"{module.path}.packed.")
        name, weight = b.name("quantized_matmul"), self.stored(module.weight)
        unpacked = weight.numel * weight.dtype.size
        op = PackedLinear(
            name=name,
            ins=(module.x, weight, *biases(module)),
            out=module.out._replace(name=name),
            site=module.site,
            layer="aqlm",
            saves=("input", "weight"),
            forward_workspace_bytes=unpacked,
            backward_workspace_bytes=unpacked,
        )
        return writing((op,), op.out, module.out)

    def _check(self, module: Module) -> None:
        rows, columns = module.weight.shape
        if columns % self.in_group_size or rows % self.out_group_size:
            raise RequestError(
                f"AQLM packs groups of {self.out_group_size}x{self.in_group_size}: {module.path} has {rows}x{columns}; "
                "use another group size, or an unquantized --format"
            )
        if not module.x.dtype.is_half or module.x.dtype is not module.weight.dtype:
            raise RequestError(
                f"AQLM's kernels take inputs of their codebooks' half precision, and {module.path} is given "
                f"{module.x.dtype.label} for {module.weight.dtype.label}; use --dtype and --precision bf16 or fp16"
            )


FORMAT = Aqlm
EXAMPLES = (Aqlm(), Aqlm(num_codebooks=2, nbits_per_codebook=8), Aqlm(in_group_size=16, prepare=False))
UNVERIFIED: dict[str, str] = {}
