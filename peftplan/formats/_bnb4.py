"""bitsandbytes 4-bit: packed data, block constants, compute dtype (bitsandbytes 0.50.2).

Storage (functional.py, quantize_4bit): two weights a byte; one fp32 absmax per block; a 16-entry fp32 code per weight
matrix; with double quantization the absmax are 8-bit with one fp32 constant per 256 of them, a 256-entry fp32 code and
an fp32 offset (Dettmers 2023, arXiv:2305.14314, section 3).
Compute (nn/modules.py, Linear4bit.forward; autograd/_functions.py, MatMul4Bit): the input is cast to the compute
dtype, the output back to the input's; only the packed weight is kept; backward dequantizes the whole weight.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Literal

from peftplan.errors import RequestError
from peftplan.formats._packing import pack
from peftplan.formats.base import Format, Piece
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import PackedLinear
from peftplan.units import DType, ceil_div, parse_dtype

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Bnb4(Format, ABC):
    """Knobs of transformers' BitsAndBytesConfig for 4 bit."""

    double_quant: bool = False
    blocksize: int = 64
    compute_dtype: str | None = None
    quant_storage: str | None = None
    """The dtype that packed weights are stored as, which matters where they are sharded: FSDP needs a floating one.
    Unset: the compute dtype, as FSDP's users are told (transformers' own default, uint8, leaves weights whole)."""
    prepare: bool = True
    """Whether peft.prepare_model_for_kbit_training runs before the adapter is put on."""
    cast_back: Literal["none", "trl"] = "none"
    """trl: TRL's peft_module_casting_to_bf16 ran too, which puts embeddings and head, but not norms, back to bf16
    (trl/models/utils.py, 0.13)."""

    @property
    def packed(self) -> bool:
        return True

    @property
    def upcasts_rest(self) -> bool:
        return self.prepare

    @property
    def upcasts_ends(self) -> bool:
        return self.prepare and self.cast_back == "none"

    def bias_dtype(self, compute: DType, rest: DType) -> DType:
        """Linear4bit.forward casts its bias to the compute dtype for good."""
        del rest
        return parse_dtype(self.compute_dtype) if self.compute_dtype is not None else compute

    def stored_bytes(self, numel: int) -> int:
        """Bytes of one packed weight with its constants."""
        if self.blocksize not in BLOCKSIZES:
            raise RequestError(f"format.blocksize={self.blocksize}: use one of {', '.join(map(str, BLOCKSIZES))}")
        blocks = ceil_div(numel, self.blocksize)
        packed = ceil_div(numel, 2)
        code = 16 * 4
        if not self.double_quant:
            return packed + 4 * blocks + code
        return packed + blocks + 4 * ceil_div(blocks, 256) + 256 * 4 + 4 + code

    def pieces(self, weight: Tensor) -> tuple[Piece, ...]:
        """functional.py, quantize_4bit: the kernel makes absmax, then the packed weight; each weight has a code of its
        own. Double quantization packs `absmax - offset` (quantize_blockwise) and drops absmax and difference."""
        blocks = ceil_div(weight.numel, self.blocksize)
        absmax, packed, code = Piece(4 * blocks, not self.double_quant), Piece(ceil_div(weight.numel, 2)), Piece(16 * 4)
        if not self.double_quant:
            return absmax, packed, code
        nested = Piece(4 * ceil_div(blocks, 256))
        return absmax, packed, code, Piece(4), Piece(4 * blocks, stays=False), nested, Piece(blocks)

    def storage(self, compute: DType) -> DType | None:
        return parse_dtype(self.quant_storage) if self.quant_storage is not None else compute

    def expected_bytes(self, numel: int) -> int:
        return ceil_div(numel, 2)

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        inner = parse_dtype(self.compute_dtype) if self.compute_dtype is not None else compute

        def stand_in(module: Module) -> tuple[Op, ...]:
            return self._linear(module, inner, numerics)

        return pack(graph, stand_in)

    def _linear(self, module: Module, compute: DType, numerics: Numerics) -> tuple[Op, ...]:
        b = Builder(numerics, f"{module.path}.")
        given, target = module.x, module.out
        weight = module.weight._replace(stored_bytes=self.stored_bytes(module.weight.numel), trainable=False)
        bias = tuple(t for op in module.ops for t in op.ins if t.is_param and len(t.shape) == 1)
        with b.marked(module.site):
            x = b.cast(given, compute, label="compute_x")
            name = b.name("gemm_4bit")
            out = target._replace(name=name, dtype=compute)
            dequantized = weight.numel * compute.size
            # Backward unpacks to the dtype that was packed, and casts that before it makes the gradient.
            again = weight.numel * weight.dtype.size if weight.dtype is not compute else 0
            # On the CPU the block constants are unpacked in one go with the product.
            unpacked = self.double_quant and numerics.backend == "cpu"
            constants = 4 * ceil_div(weight.numel, self.blocksize) if unpacked else 0
            b.ops.append(
                PackedLinear(
                    name=name,
                    ins=(x, weight, *bias),
                    out=out,
                    site=module.site,
                    adapters_clone=True,
                    forward_workspace_bytes=dequantized + constants,
                    backward_workspace_bytes=dequantized + max(0, again - x.numel * compute.size),
                )
            )
            final = b.cast(out, given.dtype, label="out")
            b.hold(x, given)
        return writing(b.ops, final, target)
