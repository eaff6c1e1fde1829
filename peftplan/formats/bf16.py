"""bfloat16: 8 exponent bits, 2 bytes a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.formats.base import Plain
from peftplan.units import DType


@final
@dataclass(frozen=True)
class Bf16(Plain):
    def dtype(self) -> DType:
        return DType.bfloat16


FORMAT = Bf16
EXAMPLES = (Bf16(),)
UNVERIFIED: dict[str, str] = {}
