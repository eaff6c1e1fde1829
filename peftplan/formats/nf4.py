"""NormalFloat 4 bit (bitsandbytes): the quantiles of a normal distribution as code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.formats._bnb4 import Bnb4


@final
@dataclass(frozen=True)
class Nf4(Bnb4):
    pass


FORMAT = Nf4
EXAMPLES = (Nf4(), Nf4(double_quant=True), Nf4(blocksize=128, prepare=False))
UNVERIFIED: dict[str, str] = {}
