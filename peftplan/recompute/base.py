"""What a recompute policy is: which layers are checkpointed, and what of them stays all the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from peftplan.graph.core import Region


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """How one layer is checkpointed: by CheckpointFunction where `reentrant`; `cached` are the indices of the ops whose
    results selective checkpointing keeps."""

    reentrant: bool = False
    cached: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Recompute(ABC):
    """A policy with its settings. A file with more of them adds fields."""

    layers: ClassVar[bool] = True
    """Whether layers are checkpointed at all."""
    uniform: ClassVar[bool] = True
    """Whether equal layers are all treated alike."""

    use_reentrant: bool = False
    """Which of torch.utils.checkpoint's two flavours runs."""

    @property
    def reentrant(self) -> bool:
        return self.use_reentrant

    @abstractmethod
    def checkpoint(self, region: Region, index: int) -> Checkpoint | None:
        """How the layer `index` of the model, which is like `region`, is checkpointed; None where it is not."""

    def alike(self, index: int, most: int) -> int:
        """How many layers, of at most `most`, are treated as `index` is, counted from there."""
        del index
        return most

    def refusal(self) -> str | None:
        """Why the library would not run this, if it would not."""
        return None
