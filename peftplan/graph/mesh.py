"""Over how many ranks the operations of one model replica are spread; a rank's graph has its shares of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Context = Literal["ring", "all_gather", "ulysses"]
"""How attention sees the tokens of other ranks: keys and values go round (Liu 2023, arXiv:2310.01889); they are
gathered; heads are exchanged for tokens (Jacobs 2023, arXiv:2309.14509)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """Degrees of the ways to split operations; 1 is not at all."""

    tp: int = 1
    """Ranks that share every matrix (Shoeybi 2019, arXiv:1909.08053)."""
    sequence: bool = False
    """Whether these share the tokens of norms and residuals too (Korthikanti 2022, arXiv:2205.05198)."""
    cp: int = 1
    """Ranks that share the tokens of a sequence."""
    context: Context = "ring"
    ep: int = 1
    """Ranks that share the experts."""

    @property
    def alone(self) -> bool:
        """Whether nothing is split."""
        return self.tp == self.cp == self.ep == 1


ONE = Mesh()
