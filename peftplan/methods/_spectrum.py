"""What FourierFT and WaveFT share: a change of the weight made of few numbers at random places of a transform."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Tensor
from peftplan.graph.edit import Module
from peftplan.methods._branches import Chosen, OnLinears, by_pattern
from peftplan.methods.base import Host
from peftplan.units import DType


@dataclass(frozen=True)
class Spectral(OnLinears):
    """The knobs that both configs have."""

    n_frequency: int = 1000
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    prefix: ClassVar[str]
    """Of its parameters' names."""

    def size(self, path: str) -> int:
        return by_pattern(path, self.n_frequency, self.n_frequency_pattern)

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        """Where each number belongs: two rows of int64 per layer."""
        del host
        return (Tensor(f"@{self.prefix}_indices", (2, sum(c.size for c in chosen)), DType.int64, BUFFER),)

    def spectrum(self, b: Builder, module: Module, size: int, host: Host) -> Tensor:
        """The numbers. Raises RequestError where the weight has no room for them."""
        if not 0 < size <= module.weight.numel:
            raise RequestError(
                f"method.n_frequency={size}: {module.path} has room for 1 to {module.weight.numel} of them"
            )
        return b.weight(f"{self.prefix}_spectrum", size, dtype=host.new_dtype, kind=ADAPTER)
