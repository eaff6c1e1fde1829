"""MXFP4, what gpt-oss comes in: experts' 4-bit floats in blocks of 32 with a power of two as scale (OCP MX v1.0, 2023).

A file holds, per stack of experts (transformers 5.23.0, integrations/mxfp4.py, Mxfp4GptOssExperts): 16 bytes and one of
scale for every 32 inputs; everything else is bf16, routers, attention, embedding and head included.
transformers trains it with `Mxfp4Config(dequantize=True)` alone (quantizer_mxfp4.py, is_trainable): a bf16 model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.formats._dequantized import Dequantized
from peftplan.graph.core import Tensor

BLOCK = 32


@final
@dataclass(frozen=True)
class Mxfp4(Dequantized):
    packed_reason: ClassVar[str] = "transformers says that MXFP4 does not train (Mxfp4HfQuantizer.is_trainable)"

    def file_bytes(self, weight: Tensor) -> int:
        if weight.shape[-1] % BLOCK:
            raise RequestError(f"MXFP4 packs blocks of {BLOCK} inputs, not {weight.shape[-1]}; use another --format")
        return weight.numel // 2 + weight.numel // BLOCK


FORMAT = Mxfp4
EXAMPLES = (Mxfp4(),)
UNVERIFIED: dict[str, str] = {}
