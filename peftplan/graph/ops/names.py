"""Values that no gradient flows through, and Python's names for values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Need, Tensor
from peftplan.graph.ops.shapes import Detached
from peftplan.units import DType


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Make(Detached):
    """A tensor made without gradient (positions, tables, masks) from `ins`, with temporaries."""

    temporary_bytes: int = 0

    def scratch_bytes(self) -> int:
        return self.temporary_bytes


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Hold(Detached):
    """Not a computation: Python names that keep values alive up to this point."""

    def moved_bytes(self) -> int:
        return 0


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Keep(Detached):
    """Not a computation: a closure that lives as long as the graph keeps values alive."""

    stashes = True

    def stashed(self, need: Need) -> tuple[Tensor, ...]:
        del need
        return self.ins

    def moved_bytes(self) -> int:
        return 0


def internal(op_name: str, label: str, shape: tuple[int, ...], dtype: DType) -> Tensor:
    """A tensor that only one op's kernel makes and keeps."""
    return Tensor(f"{op_name}.{label}", shape, dtype)
