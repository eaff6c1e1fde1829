"""LLM.int8 (bitsandbytes): one byte a weight and one fp32 scale per output row (Dettmers 2022, arXiv:2208.07339).

Mirrors bitsandbytes 0.50.2, autograd/_functions.py: MatMul8bitLt on CUDA, MatMul8bitFp on CPU. Both stash their input
for backward whatever needs a gradient, and dequantize the whole weight in backward. CUDA's forward makes an int8
copy of the input, its row scales and the int32 product; the CPU's dequantizes the weight.
Not modelled: the outlier columns of the mixed product (errs low by the outliers' share of the input, usually < 1 %).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.formats._packing import pack
from peftplan.formats.base import Format, Piece
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import PackedLinear
from peftplan.units import DType


@final
@dataclass(frozen=True)
class Int8(Format):
    prepare: bool = True
    """Whether peft.prepare_model_for_kbit_training runs before the adapter is put on."""

    @property
    def packed(self) -> bool:
        return True

    @property
    def upcasts_rest(self) -> bool:
        return self.prepare

    def opaque(self, numerics: Numerics) -> bool:
        return numerics.backend == "cuda"

    def pieces(self, weight: Tensor) -> tuple[Piece, ...]:
        """transformers takes the weight back to the CPU first, so Int8Params.to makes a second fp16 copy on the device
        (integrations/bitsandbytes.py, Bnb8bitQuantize; bitsandbytes nn/modules.py, Int8Params._quantize), then scales
        and packed weight (backends/cuda/ops.py, int8_vectorwise_quant)."""
        return Piece(2 * weight.numel, stays=False), Piece(4 * weight.shape[0]), Piece(weight.numel)

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        del compute

        def stand_in(module: Module) -> tuple[Op, ...]:
            return self._linear(module, numerics)

        return pack(graph, stand_in)

    @staticmethod
    def _linear(module: Module, numerics: Numerics) -> tuple[Op, ...]:
        b = Builder(numerics, f"{module.path}.")
        rows, columns = module.weight.shape
        weight = module.weight._replace(stored_bytes=rows * columns + 4 * rows, trainable=False)
        x, name = module.x, b.name("matmul_8bit")
        params = (t for op in module.ops for t in op.ins if t.is_param and len(t.shape) == 1)
        bias = tuple(t._replace(dtype=x.dtype) for t in params)  # Linear8bitLt.forward casts it for good
        tokens = x.numel // columns
        on_cuda = numerics.backend == "cuda"
        # The CPU's kernel is torch's linear, which autocast reaches; CUDA's are bitsandbytes' own.
        inner = x.dtype if on_cuda or numerics.autocast is None else numerics.autocast
        dequantized = weight.numel * x.dtype.size
        if inner is not x.dtype:
            dequantized += (weight.numel + x.numel) * inner.size
        b.ops.append(
            PackedLinear(
                name=name,
                ins=(x, weight, *bias),
                out=module.out._replace(name=name, dtype=inner),
                site=module.site,
                forward_workspace_bytes=tokens * (columns + 4 + 4 * rows) if on_cuda else dequantized,
                backward_workspace_bytes=dequantized,
                keeps_input=True,
            )
        )
        return writing(b.ops, b.ops[-1].out, module.out)


FORMAT = Int8
EXAMPLES = (Int8(), Int8(prepare=False))
UNVERIFIED: dict[str, str] = {}
