"""Tensors, ops and regions: a training step as a short list of values.

The granularity is that of autograd: one op is one node of torch's graph (or one fused kernel), because what a step
keeps, computes and frees is decided per node. Views are not ops: a view carries the name of the value it views, and
names are what liveness and gradients are counted by.

Shape letters: B batch, S sequence, H hidden, F feed-forward width, N heads, D head_dim, V vocabulary, r rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from math import prod
from operator import is_
from typing import ClassVar, NamedTuple

from peftplan.units import DType

# A kind says what the bytes of a tensor are for; reports group by it.
WEIGHT, ADAPTER, BUFFER, INPUT, ACTIVATION = "weight", "adapter", "buffer", "input", "activation"
PARAMS = frozenset({WEIGHT, ADAPTER})
MODULE_SITES = frozenset(
    {
        "embed",
        "q",
        "k",
        "v",
        "o",
        "qkv",
        "q_a",
        "q_b",
        "kv_a",
        "kv_b",
        "gate",
        "up",
        "down",
        "gate_up",
        "shared_gate",
        "head",
    }
)
"""Sites of the projections that formats pack and methods adapt; `router` and `experts` are sites of neither."""
COMM = "comm"
"""The part of what ranks tell each other."""
OWN_PARTS = frozenset({"base", COMM})
"""The parts that a projection has of its own."""
PENALTY = "penalty"
"""Names regions that are what the loss adds for the weights of others, and the sum that they hand on."""


class Tensor(NamedTuple):
    """A value. Equal names mean the same storage seen with another shape."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    kind: str = ACTIVATION
    trainable: bool = False
    stored_bytes: int | None = None
    """Bytes as stored where that is not numel x itemsize (packed weights with their constants)."""
    base: str = ""
    """The name of the value whose storage this is a part of, if it has none of its own."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def logical_bytes(self) -> int:
        """Bytes of a plain tensor of this shape and dtype: what a gradient of it takes."""
        return prod(self.shape) * self.dtype.size

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size if self.stored_bytes is None else self.stored_bytes

    @property
    def storage(self) -> str:
        return self.base or self.name

    @property
    def is_param(self) -> bool:
        return self.kind in PARAMS

    def view(self, *shape: int) -> Tensor:
        """The same value with another shape (reshape or transpose without a copy)."""
        return self._replace(shape=shape)


class Grad(NamedTuple):
    """What one op's backward produces for one input.

    `raw_bytes` is the gradient as the formula computes it (0: the incoming gradient's own storage is handed on);
    the engine then reduces it to the input's shape and casts it to the input's dtype
    (torch/csrc/autograd/engine.cpp, validate_outputs). `scratch_bytes` are temporaries of the formula. `over` is what
    the formula writes it over: a value that the op kept, or another of its outputs, whose gradient's storage it takes.
    """

    to: Tensor
    raw_bytes: int
    scratch_bytes: int = 0
    over: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Op(ABC):
    """One node of the autograd graph.

    `site` says which projection of the block it belongs to (`q k v o gate up down norm ...`), `part` which part of
    it (`base down up scale extra`); methods, formats and layouts find ops by these two marks alone.
    """

    name: str
    ins: tuple[Tensor, ...]
    out: Tensor
    site: str = ""
    part: str = "base"
    differentiable: ClassVar[bool] = True
    stashes: ClassVar[bool] = False
    """Whether `stashed` may name something."""
    output_first: ClassVar[bool] = False
    """Whether one kernel does it, which allocates what it returns before its temporaries; an op or a formula of
    several kernels has its temporaries first."""
    views: ClassVar[bool] = False
    """Whether the gradient of the first input comes back as a view of what the formula makes: a view keeps the tensor
    that it views, so the engine does not add to it in place."""
    narrows: ClassVar[bool] = False
    """Whether the gradients of its inputs are parts of the incoming one, seen as views: each keeps the whole alive."""
    multiplies_back: ClassVar[bool] = False
    """Whether its backward has matrix products although its forward runs nothing."""
    saves_late: ClassVar[bool] = False
    """Whether it is a Python function, which saves when it has run."""

    @property
    def also(self) -> tuple[Tensor, ...]:
        """Outputs besides `out`, whose gradients its backward takes too."""
        return ()

    pieces: ClassVar[int] = 1
    """In how many equal tensors an op's temporaries come."""

    def flops(self) -> int:
        """FLOPs of the forward as torch.utils.flop_counter counts them: matrix products only, 1 MAC = 2."""
        return 0

    def grad_flops(self, need: Need) -> int:  # noqa: ARG002
        """FLOPs of the backward, given who needs a gradient."""
        return 0

    def saved(self, need: Need) -> tuple[Tensor, ...]:  # noqa: ARG002
        """What autograd keeps until this op's backward; parameters included, views by their value's name."""
        return ()

    def stashed(self, need: Need) -> tuple[Tensor, ...]:  # noqa: ARG002
        """What a Python autograd function puts on its context without telling autograd: checkpointing cannot drop
        it and backward does not free it; it lives as long as the graph, which is as long as the loss."""
        return ()

    def over(self, ins: tuple[Tensor, ...], out: Tensor) -> Op:
        """The same op between other values; itself where these are its own."""
        same = out is self.out and all(map(is_, ins, self.ins))
        return self if same else replace(self, ins=ins, out=out)

    @abstractmethod
    def backward(self, need: Need) -> tuple[Grad, ...]:
        """The gradients this op's backward produces, in the order it computes them."""

    def scratch_bytes(self) -> int:
        """Temporaries of the forward, alive together with inputs and output."""
        return 0

    def returned(self) -> tuple[Tensor, ...]:
        """What its kernel hands back: what selective checkpointing keeps where it keeps the op's results."""
        return (self.out,)

    def prepared_bytes(self) -> int:
        """Temporaries made before its kernel runs, which are made again even where its results were kept."""
        return 0

    def moved_bytes(self) -> int:
        """Bytes read and written by the forward kernel, for the roofline."""
        total = self.out.nbytes
        for t in self.ins:
            total += t.nbytes
        return total


Need = frozenset[str] | set[str]


@dataclass(frozen=True, kw_only=True)
class Region:
    """Ops that run together: the embedding, one decoder layer, the head with its loss.

    `entry` is the hidden state that comes in (None for the first region), `exit` the one handed on. `returned` names
    values that are part of the model's output (logits, KV cache) and live as long as that does; `held` names values
    that a caller of the model made, and holds until the model's forward returns; `lingers` names those that somebody
    holds on to from a checkpointed forward until the layer runs again, `trails` those of that second run until its
    backward is done, with the graph that made them. `idle` names values that are made for layers and handed to none,
    which no checkpoint holds. `handed` names values of which every layer takes its own part: that layer's `taken`,
    alive on entry and freed by it. `leaf` is the embedding's output, which checkpointing makes a leaf that requires a
    gradient, where that is not the exit. `penalty` is what the loss adds for this region's own weights, once for each
    of `count`: it takes the sum of those before it and hands on the longer sum. Penalties run after the head in the
    order of their regions, so their backward runs first of all.
    """

    name: str
    ops: tuple[Op, ...]
    entry: Tensor | None
    exit: Tensor
    count: int = 1
    """How many equal regions follow each other."""
    returned: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    lingers: tuple[str, ...] = ()
    trails: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    handed: tuple[str, ...] = ()
    taken: tuple[Tensor, ...] = ()
    leaf: str | None = None
    first_index: int | None = None
    """Index of the first decoder layer of the run."""
    borrows: bool = False
    """Whether its base weights are those of other layers, and counted there."""
    penalty: Region | None = None

    @property
    def is_head(self) -> bool:
        """Whether it holds the head and the loss."""
        return self.name == "head"

    @property
    def is_penalty(self) -> bool:
        """Whether it is what the loss adds for another region's weights."""
        return self.name == PENALTY

    def params(self) -> Iterable[Tensor]:
        """Every parameter once, in order of use."""
        return self._params

    def owned(self) -> Iterable[Tensor]:
        """Those that are counted here."""
        return (t for t in self._params if t.kind == ADAPTER) if self.borrows else self._params

    @cached_property
    def projections(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of every projection: consecutive base ops of one site, with what ranks tell each other."""
        end, found = 0, []
        marks = (op.site if op.part in OWN_PARTS and op.site in MODULE_SITES else None for op in self.ops)
        for site, run in groupby(marks):
            start, end = end, end + len(list(run))
            if site is not None and any(op.part == "base" for op in self.ops[start:end]):
                found.append((start, end))
        return tuple(found)

    @cached_property
    def _params(self) -> tuple[Tensor, ...]:
        found: dict[str, Tensor] = {}
        for op in self.ops:
            for t in op.ins:
                if t.kind in PARAMS and t.name not in found:
                    found[t.name] = t
        return tuple(found.values())


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The forward of a model as regions in order; the loss is the last op's output of the last region.

    `inputs` are batch tensors, alive through the whole step; `unused` are parameters no op reads. `prelude` is a pass
    without gradient that runs before, on the weights of `regions`, and whose caller holds every layer's input.
    """

    regions: tuple[Region, ...]
    inputs: tuple[Tensor, ...] = ()
    buffers: tuple[Tensor, ...] = ()
    unused: tuple[Tensor, ...] = field(default=())
    prelude: tuple[Region, ...] = ()

    def params(self) -> Iterable[tuple[Tensor, int]]:
        """Each distinct parameter with how many equal copies of it exist (one per layer of a run).

        A parameter whose name starts with `@` is shared by name across regions (tied weights, shared adapters).
        """
        return self._params

    @cached_property
    def _params(self) -> tuple[tuple[Tensor, int], ...]:
        found: list[tuple[Tensor, int]] = []
        seen: set[str] = set()
        for region in self.regions:
            for t in region.owned():
                if not is_global(t.name):
                    found.append((t, region.count))
                elif t.name not in seen:
                    seen.add(t.name)
                    found.append((t, 1))
        return (*found, *((t, 1) for t in self.unused))


def is_global(name: str) -> bool:
    """Whether a value is one for the whole model rather than one per region: its name starts with `@`."""
    return name.startswith("@")


def verify(graph: Graph) -> Iterator[str]:
    """What is malformed, a line each: a name written twice, a value read before it is written, regions that do not fit.

    Nothing for a well-formed graph. Methods and formats are checked with it; no estimate pays for it.
    """
    given = {t.name for t in (*graph.inputs, *graph.buffers)}
    yield from _misruns(graph.prelude, given)
    yield from _misruns(graph.regions, given)


def _misruns(regions: tuple[Region, ...], given: set[str]) -> Iterator[str]:
    """What is malformed in one pass over regions, for which what is `given` exists."""
    known = set(given)
    before: Tensor | None = None
    for region in regions:
        yield from _misfits(region, before)
        yield from _misorders(region, known)
        if region.penalty is not None:
            yield from _misorders(region.penalty, known)
            yield from _strangers(region.penalty, region)
        known |= {op.out.name for op in region.ops if is_global(op.out.name)}
        before = region.exit


def _misfits(region: Region, before: Tensor | None) -> Iterator[str]:
    """Whether a region takes what the one before, and for a run of layers the region itself, hands on."""
    entry = region.entry
    sources = [before, *([region.exit] if region.count > 1 else [])]
    for source in sources if entry is not None else ():
        if source is None or entry is None or (source.shape, source.dtype) != (entry.shape, entry.dtype):
            yield f"{region.name}: takes {entry}, is given {source}"


def _strangers(penalty: Region, region: Region) -> Iterator[str]:
    """Weights of a penalty that are not its region's own."""
    own = {t.name for t in region.params()}
    yield from (f"{region.name}: its penalty reads {t.name}, which it lacks" for t in penalty.params()
                if t.name not in own)  # fmt: skip


def _misorders(region: Region, known: set[str]) -> Iterator[str]:
    """Static single assignment within a region: every value is written once, and before it is read."""
    written = known | {t.name for t in (region.entry, *region.taken) if t is not None}
    params = {t.name for t in region.params()}
    for op in region.ops:
        for t in op.ins:
            if not t.is_param and t.name not in written:
                yield f"{region.name}: {op.name} reads {t.name} before it is written"
        if op.out.base and op.out.base not in written | params:
            yield f"{region.name}: {op.name} views {op.out.base} before it is written"
        if op.out.name in written and op.out.nbytes:  # who only holds names writes nothing
            yield f"{region.name}: {op.name} writes {op.out.name} a second time"
        written.add(op.out.name)
    if region.exit.name not in written:
        yield f"{region.name}: nothing writes its exit {region.exit.name}"
