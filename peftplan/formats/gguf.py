"""GGUF, llama.cpp's files: blocks of 32 or 256 weights, of a type of its own for every tensor.

A file holds every matrix in the type that llama.cpp's quantize gives it (`_ggml`), norms and biases in fp32.
transformers 5.23.0 says that its packed GGUF layers do not train (quantizer_gguf.py, is_trainable); with `dequantize`,
or without its kernels, it unpacks the whole model as it loads: a plain base, in --dtype. No file is read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

from peftplan.errors import RequestError
from peftplan.formats._dequantized import Dequantized
from peftplan.formats._ggml import BASE, fitting, packed_bytes, type_of
from peftplan.graph.core import Graph, Region, Tensor, is_global
from peftplan.graph.edit import modules


@final
@dataclass(frozen=True)
class Gguf(Dequantized):
    """`file_type` as llama.cpp's quantize names it."""

    file_type: str = "Q4_K_M"
    imatrix: bool = False
    """Whether quantize had an importance matrix, which the smallest types demand."""
    packed_reason: ClassVar[str] = "transformers says that packed GGUF layers do not train (GgufHfQuantizer)"

    def file_bytes(self, weight: Tensor) -> int:
        """Of a matrix in the file type's own type."""
        rows, columns = weight.shape
        return packed_bytes(fitting(self._base(), columns), rows, columns)

    def _base(self) -> str:
        if self.file_type not in BASE:
            raise RequestError(f"format.file_type={self.file_type!r}: use one of {', '.join(BASE)}")
        return BASE[self.file_type]

    def model_bytes(self, graph: Graph) -> int:
        """All tensors of a file, given the model's graph; a tied embedding is there once, as the head."""
        self._base()
        found = _Matrices.of(graph)
        return sum(self._held(t, region, found) for region, t in found.weights)

    def _held(self, t: Tensor, region: Region, found: _Matrices) -> int:
        if len(t.shape) != 2:
            return 4 * t.numel * region.count
        rows, columns = t.shape
        total = 0
        for index in range(region.first_index or 0, (region.first_index or 0) + region.count):
            kind = type_of(
                self.file_type, found.part(t), index, layers=found.layers, group=found.group, imatrix=self.imatrix
            )
            total += packed_bytes(fitting(kind, columns), rows, columns)
        return total


class _Matrices(NamedTuple):
    """What of a model decides its tensors' types."""

    weights: tuple[tuple[Region, Tensor], ...]
    sites: dict[str, str]
    layers: int
    group: int
    """How many times wider queries are than keys."""

    @classmethod
    def of(cls, graph: Graph) -> _Matrices:
        found = [m for region in graph.regions for _, _, m in modules(region)]
        widths = {m.site: m.out_features for m in found}
        seen: dict[str, tuple[Region, Tensor]] = {}
        for number, region in enumerate(graph.regions):
            for t in region.params():
                seen.setdefault(t.name if is_global(t.name) else f"{number}.{t.name}", (region, t))
        return cls(
            weights=tuple(seen.values()),
            sites={m.weight.name: m.site for m in found if m.site != "embed"},
            layers=sum(region.count for region in graph.regions if region.first_index is not None),
            group=widths["q"] // widths["k"] if "k" in widths else 1,
        )

    def part(self, t: Tensor) -> str:
        """The site of a matrix; a tied embedding counts as the head."""
        return self.sites.get(t.name, "embed")


FORMAT = Gguf
EXAMPLES = (Gguf(), Gguf(file_type="Q8_0"), Gguf(file_type="IQ2_XS"))
UNVERIFIED: dict[str, str] = {}
