"""Floating point 4 bit (bitsandbytes): 1 sign, 2 exponent, 1 mantissa bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.formats._bnb4 import Bnb4


@final
@dataclass(frozen=True)
class Fp4(Bnb4):
    pass


FORMAT = Fp4
EXAMPLES = (Fp4(), Fp4(double_quant=True), Fp4(blocksize=128, prepare=False))
UNVERIFIED: dict[str, str] = {}
