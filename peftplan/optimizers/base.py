"""What an optimizer costs: its states per trainable weight and what its step needs for a moment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any, ClassVar, NamedTuple

from peftplan.graph.core import Region, Tensor, is_global
from peftplan.units import DType


class Trained(NamedTuple):
    """One trainable weight, and how many equal ones (`copies`) there are."""

    shape: tuple[int, ...]
    dtype: DType
    copies: int = 1
    name: str = ""
    """As in the model, of the first layer that has it: `model.layers.0.self_attn.q_proj.weight`."""
    run: int = 0
    """Weights of one run of equal layers share it: they come layer by layer."""

    @staticmethod
    def of(t: Tensor, region: Region, run: int = 0) -> Trained:
        """A weight of the graph, by its full name in the first of its region's layers."""
        name, copies = t.name.removeprefix("@"), 1 if is_global(t.name) else region.count
        if region.first_index is not None and not is_global(t.name):
            name = f"model.layers.{region.first_index}.{name}"
        elif not name.startswith("lm_head"):
            name = f"model.{name}"
        return Trained(t.shape, t.dtype, copies, name, run)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.size

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def is_embedding(self) -> bool:
        return "embed" in self.name


class State(NamedTuple):
    """One state tensor that exists `copies` times. `host` where it is not in device memory."""

    bytes: int
    copies: int
    host: bool = False


class Locals:
    """The local variables of a step, as CPython keeps them: a name holds its tensor until it is bound to another one,
    which is there before the old one goes. `peak` is the most bytes they held at once."""

    __slots__ = ("_held", "_total", "peak")

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._total = 0
        self.peak = 0

    def touch(self, size: int) -> None:
        """Temporaries of `size` bytes, gone at once."""
        self.peak = max(self.peak, self._total + size)

    def bind(self, name: str, size: int, *, beside: int = 0) -> None:
        """`name` is bound to a new tensor of `size` bytes (0: one that exists already), made with temporaries of
        `beside` bytes still there."""
        self.touch(size + beside)
        self._total += size - self._held.get(name, 0)
        self._held[name] = size

    def shift(self, size: int) -> None:
        """What outlives the loop: `size` bytes come, or where negative, go."""
        self._total += size
        self.touch(0)

    def drop(self, *names: str) -> None:
        """These go out of scope, or hold what others hold."""
        for name in names:
            self._total -= self._held.pop(name, 0)


@dataclass(frozen=True)
class Optimizer(ABC):
    """Knobs and cost of one optimizer.

    A subclass says what the update of one weight makes (`update`, in a loop over all of them), or, where it takes all
    weights at once, what the step makes (`step_bytes`).
    """

    in_backward: bool = False
    """Each weight is updated as soon as its gradient is there, which then dies (register_post_accumulate_grad_hook)."""

    def knob(self, name: str) -> Any:
        """The value of one of its settings."""
        return getattr(self, name)

    holds_gradients: ClassVar[bool] = False
    """Whether gradients are parts of buffers that are always there, and counted with its states."""
    late: ClassVar[bool] = False
    """In backward, a gradient is used when the next one arrives; every micro-batch is a step."""

    @abstractmethod
    def states(self, weights: Sequence[Trained], backend: str) -> Iterable[State]:
        """Every state tensor between steps."""

    def step_bytes(self, weights: Sequence[Trained], backend: str) -> int:
        """The most temporaries alive at once during the step, on top of weights, gradients and states."""
        local = Locals()
        for w in self.order(weights):
            self.update(local, w, backend)
        return local.peak

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        """What the step's loop makes for one weight. Here: nothing, one kernel does it all."""
        del local, w, backend

    def order(self, weights: Sequence[Trained]) -> Iterator[Trained]:
        """The weights as the step's loop meets them."""
        return as_met(weights)

    @property
    def frees_gradients(self) -> bool:
        """Whether gradients die in backward, each after `update_bytes`."""
        return self.in_backward

    def update_bytes(self, w: Trained, backend: str) -> int | None:
        """The most temporaries alive at once while one weight is updated alone; None where its gradient stays."""
        return self.step_bytes([w._replace(copies=1)], backend)


def as_met(weights: Iterable[Trained]) -> Iterator[Trained]:
    """Weights in the model's order. Of a run of equal layers the first two: what a loop over them holds at most, it
    holds by then."""
    for _, run in groupby(weights, key=lambda w: w.run):
        layer = list(run)
        yield from layer
        yield from (w for w in layer if w.copies > 1)


def each_and_step(weights: Iterable[Trained], *, count: int, step_on_host: bool) -> Iterator[State]:
    """`count` states of each weight's own dtype, and a counter of 4 bytes: how torch's own optimizers keep them."""
    for w in weights:
        yield State(w.bytes, count * w.copies)
        yield State(4, w.copies, host=step_on_host)


def by_dtype(weights: Iterable[Trained]) -> dict[DType, int]:
    """Bytes of all weights of each dtype, in the order they are met: what a foreach kernel works on at once."""
    groups: dict[DType, int] = {}
    for w in weights:
        groups[w.dtype] = groups.get(w.dtype, 0) + w.bytes * w.copies
    return groups


def foreach_bytes(weights: Iterable[Trained]) -> int:
    """One list of tensors like a dtype's weights, under one name: the list of the dtype before is still there while
    the next is made."""
    sizes = list(by_dtype(weights).values())
    return max((a + b for a, b in zip([0, *sizes], sizes, strict=False)), default=0)
