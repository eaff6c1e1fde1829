"""IEEE half precision: 2 bytes a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.formats.base import Plain
from peftplan.units import DType


@final
@dataclass(frozen=True)
class Fp16(Plain):
    def dtype(self) -> DType:
        return DType.float16


FORMAT = Fp16
EXAMPLES = (Fp16(),)
UNVERIFIED: dict[str, str] = {}
