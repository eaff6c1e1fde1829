"""Weights by the groups that a framework gathers together, and what a training step does to each group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal, NamedTuple, Protocol

from peftplan.layouts.base import Layout
from peftplan.units import DType

UNSHARDED_GRADIENTS = "@@gradients of the root"
"""The event key of every gradient that is still whole when backward ends."""


class Piece(NamedTuple):
    """One parameter as it is stored: `shape` counts elements of `held`, whatever those pack."""

    name: str
    shape: tuple[int, ...]
    held: DType
    """Between steps."""
    gathered: DType
    """As operations read it."""
    trainable: bool
    beside_bytes: int = 0
    """What comes with it and is not sharded: quantization constants."""
    whole: bool = False
    """Whether the framework leaves it out, so that every rank holds all of it."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Unit(NamedTuple):
    """Parameters that are gathered together. `apart` says of one that is no layer's which ends of the model it is."""

    name: str
    pieces: tuple[Piece, ...]
    is_layer: bool = False

    @property
    def sharded(self) -> Iterable[Piece]:
        return (p for p in self.pieces if not p.whole)

    @property
    def trains(self) -> bool:
        return any(p.trainable for p in self.pieces)


Whole = Sequence[tuple[int, str]]
"""Gradients of whole parameters: bytes and key of each."""


class Ledger(Protocol):
    """Where a schedule writes what it allocates and frees. Keys begin with `@@` and are freed first in, first out; what
    is allocated on a stream of its own, and so in segments of its own, says which: `@@gather/whole parameters`."""

    def alloc(self, size: int, where: str, key: str) -> None: ...

    def free(self, size: int, key: str) -> None: ...

    def drop(self, gradients: Whole) -> None:
        """Whole gradients go."""

    def keep(self, sizes: Sequence[int]) -> None:
        """A rank keeps tensors of so many bytes as its gradients."""


class Schedule:
    """One step of one rank: told where forward and backward stand, it allocates and frees. All of it does nothing
    unless a framework says otherwise."""

    times: int = 1
    """How many equal units stand for the one that runs."""

    def begin(self, ledger: Ledger) -> None:
        """The model's forward is entered."""

    def enter(self, unit: Unit, ledger: Ledger) -> None:
        """A unit's forward begins."""

    def leave(self, unit: Unit, ledger: Ledger) -> None:
        """A unit's forward has ended."""

    def end(self, ledger: Ledger) -> None:
        """The model's forward has returned."""

    def begin_backward(self, last: Unit, ledger: Ledger) -> None:
        """Backward is entered; `last` is the unit that ran last in forward, but for the root."""

    def enter_backward(self, unit: Unit, before: Unit | None, ledger: Ledger) -> None:
        """A unit's backward begins; `before` ran before it in forward."""

    def leave_backward(self, unit: Unit, gradients: Whole, ledger: Ledger, *, late: bool) -> None:
        """A unit's backward has ended; `late` where its input needs no gradient, so that nobody notices."""

    def end_backward(self, gradients: Whole, ledger: Ledger) -> None:
        """Backward is done; these are the gradients of what is no layer's."""


Before = Literal["none", "whole", "shards"]
"""What is there of the gradients of micro-batches before: nothing, them all, or a rank's part."""
Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all", "send_recv"]


class Message(NamedTuple):
    """Collectives of one optimizer step: `bytes` is the size of the whole tensors in all, `ranks` who takes part."""

    collective: Collective
    bytes: int
    ranks: int
    across: bool = False
    """Whether the groups are those that hold copies of the same shards."""
    calls: int = 1
    within: bool = False
    """Whether the ranks are of one replica, and so next to each other."""


@dataclass(frozen=True)
class Style(ABC):
    """How a framework spreads a replica's weights over data-parallel ranks, with its own settings."""

    shards_weights: ClassVar[bool] = False
    gathers_new: ClassVar[bool] = True
    """Whether a method's own weights are seen in the dtype they are gathered in by the code around them."""
    hooks_reruns: ClassVar[bool] = False
    """Whether it hooks onto inputs and outputs of a layer when that runs with gradients: where a reentrant checkpoint
    runs it, in backward only. Then nothing is gathered ahead for it, and frozen weights' hooks hold what it took in."""

    def kept_bytes(self, piece: Piece, layout: Layout) -> int:
        """Of one parameter's gradient, what a rank has between micro-batches and before the optimizer's step."""
        return sum(self.held_bytes(piece, layout))

    def regrouped(self, unit: Unit) -> Unit:
        """The unit by the tensors that the framework makes of its parameters."""
        return unit

    @abstractmethod
    def held_bytes(self, piece: Piece, layout: Layout) -> Sequence[int]:
        """Bytes of every tensor that the fullest rank keeps of one parameter between steps."""

    def stepped(self, piece: Piece, layout: Layout) -> tuple[int, ...]:
        """The shape of what the fullest rank's optimizer steps over for one parameter."""
        del layout
        return piece.shape

    def buffers(self, units: Sequence[tuple[Unit, int]], layout: Layout) -> Sequence[int]:
        """Bytes of every buffer that lives between steps, beside weights, gradients and states."""
        del units, layout
        return ()

    overlaps: ClassVar[float] = 0.6
    """The share of a step's own work behind which collectives can hide: backward's two thirds, but for its start."""
    autocasts: ClassVar[bool] = True
    """Whether mixed precision is torch's autocast."""
    masters: ClassVar[DType | None] = None
    """The dtype of the one flat copy of half-precision weights that the optimizer steps over; None where there is none.
    """

    def gathers_in(self, autocast: DType | None) -> DType | None:
        """The dtype that operations read every weight in, where the framework casts them."""
        del autocast
        return None

    def upcasts(self, *, mixed: bool, packed: bool) -> bool:
        """Whether trainable half-precision weights are held in fp32."""
        del mixed, packed
        return False

    def before(self, *, accumulates: bool) -> Before:
        """What is there of gradients when the last micro-batch begins, where there are others before."""
        return "whole" if accumulates else "none"

    def schedule(self, units: Sequence[tuple[Unit, int]], layout: Layout, *, adds: bool) -> Schedule:
        """What a step allocates beside the model's own operations, where weights are sharded; `adds` where a rank's
        gradients exist and new ones are added to them. The last of the units is the root."""
        del units, layout, adds
        return Schedule()

    @abstractmethod
    def messages(
        self, units: Sequence[tuple[Unit, int]], layout: Layout, *, micro_batches: int, backwards: bool
    ) -> Sequence[Message]:
        """What an optimizer step sends."""
