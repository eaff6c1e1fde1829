"""What a recompute policy is: which layers are checkpointed, and what of them stays all the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from peftplan.graph.core import Graph, Region
from peftplan.units import DType


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """How one layer is checkpointed.

    By CheckpointFunction where `reentrant`; `cached` are the indices of the ops whose results selective checkpointing
    keeps. The layer's input waits in host memory where `offloaded`, cast to `host_dtype`, and comes back into a buffer
    that lives on where `staged`; `beside` says that it is copied while the layer computes.
    """

    reentrant: bool = False
    cached: frozenset[int] = frozenset()
    offloaded: bool = False
    staged: bool = False
    beside: bool = False
    host_dtype: DType | None = None


@dataclass(frozen=True)
class Recompute(ABC):
    """A policy with its settings. A file with more of them adds fields."""

    layers: ClassVar[bool] = True
    """Whether layers are checkpointed at all."""
    uniform: ClassVar[bool] = True
    """Whether equal layers are all treated alike."""

    use_reentrant: bool = False
    """Which of torch.utils.checkpoint's two flavours runs."""
    offload: bool = False
    """Whether what a layer's second run starts from waits in pinned host memory (transformers 5.23, modeling_utils.py,
    activation_checkpointing_enable(offload=True)); what --offload activations asks for."""

    @property
    def reentrant(self) -> bool:
        return self.use_reentrant

    @abstractmethod
    def checkpoint(self, region: Region, index: int, depth: int) -> Checkpoint | None:
        """How the layer `index` of `depth` layers, which is like `region`, is checkpointed; None where it is not."""

    def whole(self) -> Checkpoint:
        """A layer checkpointed as a whole."""
        return Checkpoint(reentrant=self.reentrant, offloaded=self.offload)

    def alike(self, index: int, depth: int, most: int) -> int:
        """How many layers, of at most `most`, are treated as `index` is, counted from there."""
        del index, depth
        return most

    @property
    def least_sent_bytes(self) -> int | None:
        """From how many bytes on everything that is kept for backward, beside the head's, waits in host memory; None
        where nothing does but what checkpoints hold."""
        return None

    def buffers(self, graph: Graph) -> tuple[int, ...]:
        """Bytes of what stays on the device for it between steps."""
        del graph
        return ()

    def refusal(self) -> str | None:
        """Why the library would not run this, if it would not."""
        return None
