"""compressed-tensors, what LLM Compressor writes: weights of 4 or 8 bits by group, or of 8 bits by output.

A file holds, per linear layer but the head (compressed-tensors 0.20.0, compressors/*/base.py): for `w4a16` and `w8a16`
`weight_packed` in words of 32 bits along the inputs, a scale of 2 bytes for every group and output, zeros packed along
the outputs where it is not symmetric, and `weight_shape`, two int64; for `w8a8` and `fp8` a byte a weight and a scale
of 2 bytes for every output.
transformers 5.23.0 trains on it unpacked (quantizer_compressed_tensors.py): with `dequantize` the model is dense from
the start; without, it would unpack itself at its first forward and go on rounding activations as its scheme says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.formats._dequantized import Dequantized
from peftplan.graph.core import Tensor
from peftplan.units import ceil_div

_GROUPED = {"w4a16": 4, "w8a16": 8}


@final
@dataclass(frozen=True)
class CompressedTensors(Dequantized):
    """A scheme, and for grouped ones the group and whether it does without zeros."""

    scheme: Literal["w4a16", "w8a16", "w8a8", "fp8"] = "w4a16"
    group_size: int = 128
    symmetric: bool = True
    packed_reason: ClassVar[str] = "the layers unpack at the first forward and round activations, which is not modelled"

    def file_bytes(self, weight: Tensor) -> int:
        rows, columns = weight.shape
        bits = _GROUPED.get(self.scheme)
        if bits is None:
            return rows * columns + 2 * rows
        groups = ceil_div(columns, self.group_size)
        zeros = 0 if self.symmetric else 4 * ceil_div(rows * bits, 32) * groups
        return 4 * rows * ceil_div(columns * bits, 32) + 2 * rows * groups + zeros + 2 * 8


FORMAT = CompressedTensors
EXAMPLES = (CompressedTensors(), CompressedTensors(scheme="w8a8"), CompressedTensors(scheme="fp8"))
UNVERIFIED: dict[str, str] = {}
