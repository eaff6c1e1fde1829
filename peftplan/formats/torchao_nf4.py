"""NormalFloat 4 of torchao, torchtune's QLoRA: two weights a byte, int8 scalers, bf16 factors for these (NF4Tensor).

Mirrors torchao 0.18.0, workflows/nf4/nf4_tensor.py: one int8 scaler per block of 64 weights, one factor per 256 of
them, their mean and the 16 codes, all in the weight's dtype. Forward and backward unpack the whole weight through
64-bit indices: about 14 bytes a weight at once, seven times the unpacked weight, where it is not compiled. Autograd
keeps the packed weight alone.
Blocks must come out even. torchtune packs the layers that adapters go on, and casts nothing; with PEFT the layer is
its plain one (NF4Tensor is none of the classes that lora/torchao.py knows).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.errors import RequestError
from peftplan.formats._kernel import Unpacking, packed_linear
from peftplan.formats._packing import pack
from peftplan.formats.base import Format, Piece
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import PLAIN
from peftplan.units import DType

CHUNK = 1024**2
"""How many weights are matched with the codes at a time."""


@final
@dataclass(frozen=True)
class TorchaoNf4(Format):
    """torchao's to_nf4."""

    block_size: int = 64
    scaler_block_size: int = 256

    @property
    def packed(self) -> bool:
        return True

    def opaque(self, numerics: Numerics) -> bool:
        del numerics
        return False

    def blocks(self, weight: Tensor) -> tuple[int, int]:
        """How many blocks of weights, and of scalers. Raises RequestError where torchao does."""
        scalers, left = divmod(weight.numel, self.block_size)
        factors, odd = divmod(scalers, self.scaler_block_size)
        if left or odd or weight.numel % 2:
            raise RequestError(
                f"torchao packs blocks of {self.block_size * self.scaler_block_size} weights, which "
                f"{'x'.join(map(str, weight.shape))} is no number of; set format.scaler_block_size or format.block_size"
            )
        return scalers, factors

    def stored_bytes(self, weight: Tensor) -> int:
        """Bytes of one packed weight with its constants."""
        scalers, factors = self.blocks(weight)
        return weight.numel // 2 + scalers + (factors + 1 + 16) * weight.dtype.size

    def pieces(self, weight: Tensor) -> tuple[Piece, ...]:
        """convert_to_norm_float_weight: the weight over its scalers, twice (flattened), distances to the 16 codes of a
        chunk and their absolutes, then an index a byte, and the packed weight."""
        size = weight.dtype.size
        near = Piece(16 * min(CHUNK, weight.numel) * size, stays=False)
        scalers, factors = self.blocks(weight)
        constants = Piece(scalers + (factors + 17) * size)
        return (
            constants,
            Piece(weight.logical_bytes, False),
            Piece(weight.numel, False),
            near,
            near,
            Piece(weight.numel // 2),
        )

    def expected_bytes(self, numel: int) -> int:
        return numel // 2

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        del compute

        def stand_in(module: Module) -> tuple[Op, ...]:
            b = Builder(numerics, f"{module.path}.")
            weight = module.weight._replace(stored_bytes=self.stored_bytes(module.weight), trainable=False)
            inner = numerics.autocast or module.x.dtype
            with b.marked(module.site):
                out = packed_linear(
                    b, module, weight, saves=("weight",), layer=PLAIN, unpacking=self._unpacking(weight, module, inner),
                    dtype=inner, bias="after",
                )  # fmt: skip
            return writing(b.ops, out, module.out)

        return pack(graph, stand_in)

    def _unpacking(self, weight: Tensor, module: Module, inner: DType) -> tuple[Unpacking, Unpacking]:
        """get_original_weight: 64-bit indices of either half, the halves looked up, then scaled, then together."""
        size, numel = weight.dtype.size, weight.numel
        peak = 8 * numel + 3 * numel * size + self.blocks(weight)[0] * size
        given = module.x.dtype
        cast = numel * given.size if given is not weight.dtype else 0
        wide = (numel + module.x.numel) * inner.size if given is not inner else 0
        kept = (cast or numel * size) + wide
        back = numel * inner.size
        return Unpacking(peak, kept), Unpacking(peak, back)


FORMAT = TorchaoNf4
EXAMPLES = (TorchaoNf4(block_size=8, scaler_block_size=4), TorchaoNf4(block_size=16, scaler_block_size=2))
UNVERIFIED: dict[str, str] = {}
