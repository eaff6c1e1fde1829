"""What a weight format is: how the frozen linear layers of the base are stored and computed with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from peftplan.graph.builder import Numerics
from peftplan.graph.core import Graph, Tensor
from peftplan.units import DType


class Piece(NamedTuple):
    """A tensor that packing a weight allocates; `stays` as long as the packed weight does."""

    bytes: int
    stays: bool = True


@dataclass(frozen=True)
class Format(ABC):
    """A storage of frozen weights."""

    note: ClassVar[str] = ""
    """What an answer should say of it."""
    untrainable: ClassVar[str] = ""
    """Why its library lets nothing be trained on it, where that is so; what to use instead after a semicolon."""

    @property
    @abstractmethod
    def packed(self) -> bool:
        """Whether weights are stored as something else than their compute dtype."""

    def dtype(self) -> DType | None:
        """The element type an unpacked format means, None for a packed one."""
        return None

    @property
    def upcasts_rest(self) -> bool:
        """Whether peft's prepare_model_for_kbit_training has cast every unpacked half-precision weight to fp32."""
        return False

    @property
    def prepares(self) -> bool:
        """Whether peft's prepare_model_for_kbit_training has turned gradient checkpointing on."""
        return self.upcasts_rest

    @property
    def arrives_packed(self) -> bool:
        """Whether a checkpoint holds the packed tensors themselves: loading makes its `pieces`, and nothing else."""
        return False

    @property
    def cuts(self) -> bool:
        """Whether its layers hand no gradient on, so that only adapters beside them do."""
        return False

    def opaque(self, numerics: Numerics) -> bool:
        """Whether the packed layers run in kernels that autocast does not reach."""
        del numerics
        return self.packed

    @property
    def upcasts_ends(self) -> bool:
        """Whether that holds for the embeddings and the head too when training starts."""
        return self.upcasts_rest

    def bias_dtype(self, compute: DType, rest: DType) -> DType:
        """The dtype that biases of packed layers are held in."""
        del compute
        return rest

    def pieces(self, weight: Tensor) -> tuple[Piece, ...]:
        """What packing a weight on the device allocates, in order."""
        return (Piece(weight.nbytes),)

    def held_bytes(self, weight: Tensor, size: Callable[[int], int]) -> int:
        """What a weight takes between steps, where a request of n bytes takes `size(n)`: packed ones are several."""
        if weight.stored_bytes:
            found = [piece.bytes for piece in self.pieces(weight) if piece.stays]
            if sum(found) == weight.stored_bytes:
                return sum(map(size, found))
        return size(weight.nbytes)

    def storage(self, compute: DType) -> DType | None:
        """The element type that packed weights are stored as, where a framework can shard them; None where not."""
        del compute
        return None

    def sharded_bytes(self, weight: Tensor) -> int:
        """What of a packed weight is elements of `storage`; the rest lies beside it on every rank."""
        return self.expected_bytes(weight.numel)

    def expected_bytes(self, numel: int) -> int:
        """What transformers reserves for a packed weight before it loads the model (param_element_size)."""
        return numel

    @abstractmethod
    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        """The graph with this format's stand-ins for the linear layers it packs."""


@dataclass(frozen=True)
class Plain(Format, ABC):
    """Weights stored in the dtype they are computed with."""

    @property
    def packed(self) -> bool:
        return False

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        del compute, numerics
        return graph
