"""Weights that a file holds packed and transformers unpacks before it trains: the base is a plain one then."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from peftplan.errors import RequestError
from peftplan.formats.base import Plain
from peftplan.graph.builder import Numerics
from peftplan.graph.core import Graph, Tensor
from peftplan.units import DType


@dataclass(frozen=True)
class Dequantized(Plain, ABC):
    """Not replayed: what unpacking takes while the model loads, a weight at a time."""

    dequantize: bool = True
    """transformers' setting of that name."""
    note: ClassVar[str] = "transformers unpacks the file's weights as it loads them: the base is held in its own dtype"
    packed_reason: ClassVar[str]
    """Why nothing is trained on it without."""

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        if not self.dequantize:
            raise RequestError(f"format.dequantize=false: {self.packed_reason}; leave it out")
        return super().apply(graph, compute, numerics)

    @abstractmethod
    def file_bytes(self, weight: Tensor) -> int:
        """What a checkpoint holds of a weight that it packs. Raises RequestError for shapes it cannot."""
