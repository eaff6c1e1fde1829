"""IEEE single precision: 4 bytes a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.formats.base import Plain
from peftplan.units import DType


@final
@dataclass(frozen=True)
class Fp32(Plain):
    def dtype(self) -> DType:
        return DType.float32


FORMAT = Fp32
EXAMPLES = (Fp32(),)
UNVERIFIED: dict[str, str] = {}
