"""NVFP4: 4-bit floats in blocks of 16 with an 8-bit float as scale, and a scale for the whole weight.

A file holds, per linear layer but the head (compressed-tensors 0.20.0, compressors/nvfp4/base.py): two weights a byte,
an e4m3 scale for every 16 inputs, and fp32 scales of the weight and of its input.
transformers 5.23.0 packs to NVFP4 for inference on Blackwell alone (quantizer_nvfp4.py, is_trainable), and reads files
of compressed-tensors unpacked: that is what trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.formats._dequantized import Dequantized
from peftplan.graph.core import Tensor

BLOCK = 16


@final
@dataclass(frozen=True)
class Nvfp4(Dequantized):
    packed_reason: ClassVar[str] = "transformers says that NVFP4 layers do not train (NVFP4HfQuantizer.is_trainable)"

    def file_bytes(self, weight: Tensor) -> int:
        rows, columns = weight.shape
        if columns % BLOCK:
            raise RequestError(f"NVFP4 packs blocks of {BLOCK} inputs, not {columns}; use another --format")
        return rows * columns // 2 + rows * columns // BLOCK + 2 * 4


FORMAT = Nvfp4
EXAMPLES = (Nvfp4(),)
UNVERIFIED: dict[str, str] = {}
