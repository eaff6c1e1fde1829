"""What an optimizer costs: its states per trainable weight and what its step needs for a moment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from peftplan.units import DType


class Trained(NamedTuple):
    """One trainable weight, and how many equal ones (`copies`) there are."""

    numel: int
    dtype: DType
    copies: int

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.size


class State(NamedTuple):
    """One state tensor that exists `copies` times. `host` where it is not in device memory."""

    bytes: int
    copies: int
    host: bool = False


@dataclass(frozen=True)
class Optimizer(ABC):
    """Knobs and cost of one optimizer."""

    @abstractmethod
    def states(self, weights: Sequence[Trained], backend: str) -> Iterable[State]:
        """Every state tensor between steps."""

    @abstractmethod
    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        """The most temporaries alive at once during the step, on top of weights, gradients and states."""
