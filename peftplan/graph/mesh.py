"""Over how many ranks the operations of one model replica are spread; a rank's graph has its shares of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Context = Literal["ring", "all_gather", "ulysses"]
"""How attention sees the tokens of other ranks: keys and values go round (Liu 2023, arXiv:2310.01889); they are
gathered; heads are exchanged for tokens (Jacobs 2023, arXiv:2309.14509)."""

Plan = Literal["transformers", "torchtitan", "megatron"]
"""Whose code splits matrices: `distributed_config` of transformers' models (distributed/tensor_parallel.py), the plans
of torchtitan, Megatron-Core's layers."""
Split = Literal["whole", "columns", "rows"]
"""How a linear layer is split: not at all, by what comes out of it, by what goes in."""
COLUMNS = frozenset({"q", "k", "v", "gate", "up", "head"})
ROWS = frozenset({"o", "down"})


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
    plan: Plan = "transformers"

    @property
    def alone(self) -> bool:
        """Whether nothing is split."""
        return self.tp == self.cp == self.ep == 1

    def split(self, site: str) -> Split:
        """How the linear layer at a site is split."""
        if self.tp == 1:
            return "whole"
        return "columns" if site in COLUMNS else "rows" if site in ROWS else "whole"

    def whole(self, site: str, out: int, wide: int) -> tuple[int, int]:
        """The sides of a matrix of which a rank has (out, wide); too much where they do not divide."""
        split = self.split(site)
        return out * (self.tp if split == "columns" else 1), wide * (self.tp if split == "rows" else 1)

    def part(self, size: int) -> int:
        """How much of a dimension the first rank holds, which is the most that any does."""
        return -(-size // self.tp)


ONE = Mesh()
