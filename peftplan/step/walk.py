"""Walking one region forward and backward: who is alive when.

The walk mirrors CPython's reference counting (a value dies after its last use or the last name that holds it) and
torch's autograd engine (torch/csrc/autograd/engine.cpp and input_buffer.cpp): nodes run in reverse order of creation;
a node's gradients are computed while its incoming gradient and what it saved are alive, then reduced and cast to
their inputs' shape and dtype, then the incoming gradient is freed, then what was saved, then each is handed on or
added to what is already there. All sizes are bytes, relative to what is alive when the region is entered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from peftplan.graph.core import ADAPTER, BUFFER, INPUT, PARAMS, WEIGHT, Op, Region, Tensor, is_global
from peftplan.graph.ops import WeightCast
from peftplan.units import MIB

EXIT_GRADIENT, SCRATCH = "gradient 0", "scratch"
"""Keys of events: the gradient that comes into a region's backward, and a kernel's temporaries."""


def exact(request_bytes: int) -> int:
    """A request counts for what it asks: how a trace counts."""
    return request_bytes


def block_size(request_bytes: int) -> int:
    """Bytes torch's CUDA caching allocator counts as allocated for a request, served from fresh segments.

    c10/cuda/CUDACachingAllocator.cpp: requests are rounded to 512 B; from 10 MiB on a segment is the request rounded to
    2 MiB, and a rest of at most 1 MiB is not split off, so it counts as allocated with the block.
    """
    rounded = -(-request_bytes // 512) * 512
    if rounded < 10 * MIB:
        return rounded
    segment = -(-rounded // (2 * MIB)) * (2 * MIB)
    return segment if segment - rounded <= MIB else rounded


@dataclass(slots=True)
class Watermark:
    """The highest point of a phase: total bytes, and how much of it was kept for backward or parameter gradients."""

    bytes: int = 0
    saved_bytes: int = 0
    grad_bytes: int = 0
    where: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """One storage kept for backward, and the op that keeps it."""

    op: str
    tensor: Tensor
    bytes: int


@dataclass(slots=True)
class _Storage:
    request_bytes: int
    bytes: int
    key: str
    refs: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How bytes are counted."""

    size: Callable[[int], int] = block_size
    """Bytes that a request of so many bytes counts for."""


def propagate_need(region: Region, *, entry_needs: bool, also: Iterable[str] = ()) -> set[str]:
    """Names of the region's values that require a gradient."""
    need: set[str] = set(also)
    if entry_needs and region.entry is not None:
        need.add(region.entry.name)
    for op in region.ops:
        for t in op.ins:
            if t.trainable:
                need.add(t.name)
        if op.differentiable() and any(t.name in need for t in op.ins):
            need.add(op.out.name)
    return need


_NOT_OWNED = frozenset({WEIGHT, ADAPTER, INPUT, BUFFER})


def _owned(t: Tensor) -> bool:
    return t.kind not in _NOT_OWNED


class Plan:
    """What the walks of one region share: sizes, and where each value is used last."""

    def __init__(self, region: Region, rules: Rules) -> None:
        size = rules.size
        self.out_bytes: list[int] = []
        """Per op: bytes its output takes, 0 for views."""
        self.request_bytes: dict[str, int] = {}
        self.scratch_bytes = [op.scratch_bytes() for op in region.ops]
        last: dict[str, int] = {}
        for i, op in enumerate(region.ops):
            for t in op.ins:
                if t.kind not in _NOT_OWNED:
                    storage = t.base or t.name
                    if storage[0] != "@":
                        last[storage] = i
            out = op.out
            if out.base:
                self.out_bytes.append(0)
                continue
            request = out.nbytes
            self.request_bytes[out.name] = request
            self.out_bytes.append(size(request))
            if out.name[0] != "@":
                last.setdefault(out.name, i)
        self.last_use: list[list[str]] = [[] for _ in region.ops]
        """Per op: the storages it uses last."""
        for storage, i in last.items():
            self.last_use[i].append(storage)
        self.weight_casts = tuple(op for op in region.ops if isinstance(op, WeightCast))


@dataclass(slots=True)
class RegionWalk:
    """The state of one region: forward keeps storages, backward gives them back.

    `owns_entry` is false where somebody else frees the entry: the model's forward holds the embedding output, a
    checkpoint holds its layer's input. `grads_exist` says that parameter gradients are already allocated
    (accumulation). Values in `region.returned` are part of the model's output: alive until `drop_returned`.
    """

    region: Region
    need: set[str]
    rules: Rules
    plan: Plan
    owns_entry: bool = True
    grads_exist: bool = False
    current: int = 0
    saved_bytes: int = 0
    grad_bytes: int = 0
    peak: Watermark = field(default_factory=Watermark)
    cached_bytes: int = 0
    """Autocast's copies of weights that nobody keeps for backward: they go when the forward has ended."""
    cached_names: tuple[str, ...] = ()
    before_loss: Watermark | None = None
    """The peak before the first op of the loss, in the region that holds the loss."""
    saved: list[Saved] = field(default_factory=list)
    global_grads: dict[str, int] = field(default_factory=dict)
    events: list[tuple[str, int]] | None = None
    """What is allocated (+ bytes) and freed (- bytes), by key: a storage's name, or a gradient's number."""
    entry_gradient: str | None = None
    """The key of the entry's gradient, where backward has made one."""
    param_gradients: list[str] = field(default_factory=list)
    """Keys of the parameter gradients that this region's backward leaves."""
    taken_grad_bytes: int = 0
    """Gradients of what the region took, alive until the backward of the region that handed it on."""
    _made: int = 0
    _returned: dict[str, int] = field(default_factory=dict)
    _pinned: dict[str, int] = field(default_factory=dict)
    _saves: list[tuple[Tensor, ...]] = field(default_factory=list)
    _kept: dict[str, int] = field(default_factory=dict)
    _kept_bytes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._saves = [op.saved(self.need) for op in self.region.ops]

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(self, *, keep: bool = True, stop_early: bool = False, stash: bool = True) -> None:
        """Run the ops. With `keep`, what ops save stays alive; with `stop_early`, stop where torch's
        non-reentrant recomputation stops: at the last op that saves something, before running it if what it saves
        are its inputs (torch/utils/checkpoint.py, _StopRecomputationError)."""
        ops = self.region.ops
        stop, run_last = _stopping_point(ops, self._saves) if stop_early else (len(ops), False)
        last_use, out_bytes, scratch = self.plan.last_use, self.plan.out_bytes, self.plan.scratch_bytes
        live: dict[str, int] = {}
        entry = self.region.entry
        if entry is not None and self.owns_entry:
            live[entry.storage] = self.rules.size(entry.nbytes)
        live |= {t.storage: self.rules.size(t.nbytes) for t in self.region.taken}
        exit_storage = self.region.exit.storage
        returned = () if stop_early else self.region.returned
        held = self._held_now()
        cached = {op.out.name for op in self.plan.weight_casts if op.cached}
        if stop_early:  # the graph of the recomputation holds what its nodes stash until it is thrown away
            cached |= {t.storage for op in ops for t in op.stashed(self.need)}
        for i, op in enumerate(ops[: stop + 1] if stop_early else ops):
            executed = i < stop or run_last
            if op.site == "loss" and self.before_loss is None:
                self.before_loss = self.peak
                self.start_phase()
            if executed:
                size = out_bytes[i]
                if not op.out.base:
                    live[op.out.name] = size
                    self._alloc(size, op.name, op.out.name)
                if scratch[i]:
                    self._touch(scratch[i], op.name)
            if keep and self._saves[i]:
                self._keep(op, self._saves[i], live)
            if stash:
                for t in op.stashed(self.need):
                    self._pin(t, live)
            for storage in last_use[i]:
                if storage == exit_storage and not stop_early:
                    continue
                if storage in cached or storage in held:
                    continue
                size = live.pop(storage, 0)
                if storage in returned:
                    self._returned[storage] = size
                elif size and storage not in self._kept and storage not in self._pinned:
                    self._free(size, storage)
        if stop_early:
            for storage, size in live.items():
                if storage not in self._kept:
                    self._free(size, storage)
        else:
            self.cached_names = tuple(name for name in cached if name in live and name not in self._kept)
            self.cached_bytes = sum(live[name] for name in self.cached_names)
            self._count_leaf()

    def _count_leaf(self) -> None:
        """A leaf that accumulates a gradient lives as long as the graph, which counts as kept for backward."""
        for op in self.region.ops:
            if op.out.name == self._accumulating:
                self.saved_bytes += self.rules.size(op.out.nbytes)
                self.saved.append(Saved(op=op.name, tensor=op.out, bytes=op.out.nbytes))

    def _keep(self, op: Op, saves: tuple[Tensor, ...], live: dict[str, int]) -> None:
        for t in saves:
            if not _owned(t):
                if t.kind == INPUT and t.storage not in self._kept:
                    self._kept[t.storage] = 0
                    self.saved.append(Saved(op=op.name, tensor=t, bytes=t.nbytes))
                continue
            storage = t.storage
            count = self._kept.get(storage, 0)
            self._kept[storage] = count + 1
            if count:
                continue
            size = live.get(storage)
            if size is None and (is_global(storage) or self._is_entry(storage)):
                size = 0  # somebody else's to free
            elif size is None:
                size = self.rules.size(t.nbytes)
                self._alloc(size, op.name, storage)
            self._kept_bytes[storage] = size
            if storage in self._pinned:
                continue
            self.saved_bytes += size
            self.saved.append(Saved(op=op.name, tensor=t, bytes=self.plan.request_bytes.get(storage, t.nbytes)))

    def _pin(self, t: Tensor, live: dict[str, int]) -> None:
        """A stashed value: alive until `drop_pinned`, whatever backward releases."""
        storage = t.storage
        if not _owned(t) or storage in self._pinned:
            return
        size = live.get(storage, 0)
        self._pinned[storage] = size
        if storage not in self._kept and (size or self.owns_entry):
            self.saved_bytes += size
            self.saved.append(Saved(op="stash", tensor=t, bytes=self.plan.request_bytes.get(storage, t.nbytes)))

    def forget_pinned(self) -> int:
        """Stop tracking what is pinned: the bytes stay in the account until whoever asks frees them."""
        total = sum(self._pinned.values())
        self._pinned.clear()
        return total

    def drop_pinned(self) -> None:
        """The graph dies, and with it what its nodes stashed."""
        for storage, size in self._pinned.items():
            self.saved_bytes -= size
            self._free(size, storage)
        self._pinned.clear()

    def _is_entry(self, storage: str) -> bool:
        return self.region.entry is not None and storage == self.region.entry.storage

    @property
    def entry_saved(self) -> bool:
        """Whether an op of the region keeps the entry for its backward."""
        return self.region.entry is not None and self.region.entry.storage in self._kept

    def keeps(self, storage: str) -> bool:
        """Whether backward needs, or needed, a storage of this region."""
        return storage in self._kept

    def _held_now(self) -> tuple[str, ...]:
        """Values that others hold beyond this region; a leaf is held by the node that accumulates its gradient."""
        region, leaf = self.region, self._accumulating
        return (*region.held, *region.handed) if leaf is None else (*region.held, *region.handed, leaf)

    @property
    def _accumulating(self) -> str | None:
        leaf = self.region.leaf
        return leaf if leaf in self.need else None

    def drop_held(self) -> None:
        """The model's forward has returned to the caller that held these; what autograd keeps of them stays."""
        for storage in self.region.held:
            if storage not in self._kept and storage != self.region.exit.storage:
                self._free(self.rules.size(self.plan.request_bytes[storage]), storage)

    def drop_returned(self) -> None:
        """The model's output goes out of scope; what autograd keeps of it stays."""
        for storage, size in self._returned.items():
            if storage not in self._kept_bytes:
                self._free(size, storage)
        self._returned.clear()

    # -- backward -----------------------------------------------------------------------------------------------

    def recomputed_ops(self, *, stop_early: bool = True) -> int:
        """How many ops a recomputation runs, from the first."""
        stop, run_last = _stopping_point(self.region.ops, self._saves) if stop_early else (len(self.region.ops), False)
        return stop + run_last

    def backward(self, *, root: bool = False, recompute: bool = False) -> bool:
        """Run the ops backward from the gradient of the exit, which is alive on entry. Returns whether the entry
        got a gradient, which is then alive on return. The engine itself holds the gradient of a `root`. With
        `recompute`, the forward runs again when the first saved tensor is asked for."""
        grads: dict[str, _Storage] = {}
        exit_ = self.region.exit
        if exit_.name in self.need:
            grads[exit_.name] = self._exit_gradient()
            grads[exit_.name].refs += root
        for name in self.region.handed:  # its parts' gradients meet in one
            if name in self.need:
                grads[name] = self._new(self.plan.request_bytes[name], name)
        ops = self.region.ops
        recomputed = False
        for i in range(len(ops) - 1, -1, -1):
            op = ops[i]
            incoming = grads.pop(op.out.name, None)
            if incoming is None or op.out.name == self._accumulating:
                continue
            if recompute and self._saves[i]:
                recompute = False
                recomputed = True
                self.forward(stop_early=True, stash=False)
            self._node(op, self._saves[i], incoming, grads, recomputed=recomputed)
        self.taken_grad_bytes = sum(grads[t.name].bytes for t in self.region.taken if t.name in grads)
        entry = self.region.entry
        if entry is None or entry.name not in grads:
            return False
        self.entry_gradient = grads[entry.name].key
        return True

    def _exit_gradient(self) -> _Storage:
        exit_ = self.region.exit
        request = exit_.logical_bytes
        return _Storage(request, self.rules.size(request), EXIT_GRADIENT)

    def _node(
        self, op: Op, saves: tuple[Tensor, ...], incoming: _Storage, grads: dict[str, _Storage], *, recomputed: bool
    ) -> None:
        """One node. What a checkpoint `recomputed` is handed over once, so it dies with the formula that unpacked it
        (torch/utils/checkpoint.py, unpack_hook); what a node itself saved dies after its gradients are settled."""
        made: list[tuple[Tensor, _Storage]] = []
        for grad in op.backward(self.need):
            if grad.raw_bytes:
                made.append((grad.to, self._new(grad.raw_bytes, op.name)))
                if grad.scratch_bytes:
                    self._touch(grad.scratch_bytes, op.name)
            else:
                incoming.refs += 1
                made.append((grad.to, incoming))
        if recomputed:
            self._release_saved(saves)
        for j, (to, storage) in enumerate(made):
            final = to.logical_bytes
            if final != storage.request_bytes:
                made[j] = (to, self._new(final, op.name))
                self._release(storage)
        self._release(incoming)
        if not recomputed:
            self._release_saved(saves)
        for to, storage in made:
            self._hand_on(to, storage, grads, op.name)

    def _hand_on(self, to: Tensor, storage: _Storage, grads: dict[str, _Storage], where: str) -> None:
        if to.kind in PARAMS:
            self._accumulate_param(to, storage, where)
            return
        if to.name not in self.need:
            self._release(storage)
            return
        old = grads.get(to.name)
        if old is None:
            grads[to.name] = storage
        elif old.refs == 1:  # input_buffer.cpp, accumulate: in place where nobody else holds it
            self._release(storage)
        else:
            grads[to.name] = self._new(to.logical_bytes, where)
            self._release(old)
            self._release(storage)

    def _accumulate_param(self, to: Tensor, storage: _Storage, where: str) -> None:
        size = self.rules.size(to.logical_bytes)
        if self.grads_exist or to.name in self.global_grads:
            self._release(storage)
            return
        if is_global(to.name):
            self.global_grads[to.name] = size
        if storage.refs > 1:  # an alias of an incoming gradient cannot be stolen: it is cloned
            self._release(storage)
            storage = self._new(storage.request_bytes, where)
        self.param_gradients.append(storage.key)
        self.grad_bytes += size

    def _release_saved(self, saves: tuple[Tensor, ...]) -> None:
        for t in saves:
            if not _owned(t):
                continue
            storage = t.storage
            left = self._kept[storage] - 1
            self._kept[storage] = left
            if left == 0:
                size = self._kept_bytes.pop(storage)
                if storage in self._pinned:
                    continue
                self.saved_bytes -= size
                if storage not in self._returned:
                    self._free(size, storage)

    # -- the account --------------------------------------------------------------------------------------------

    def _new(self, request_bytes: int, where: str) -> _Storage:
        size = self.rules.size(request_bytes)
        self._made += 1
        key = f"gradient {self._made}"
        self._alloc(size, where, key)
        return _Storage(request_bytes, size, key)

    def _release(self, storage: _Storage) -> None:
        storage.refs -= 1
        if storage.refs == 0:
            self._free(storage.bytes, storage.key)

    def _alloc(self, size: int, where: str, key: str) -> None:
        self.current += size
        if self.events is not None:
            self.events.append((key, size))
        if self.current > self.peak.bytes:
            self._mark(self.current, where)

    def _touch(self, size: int, where: str) -> None:
        if self.events is not None:
            self.events += ((SCRATCH, size), (SCRATCH, -size))
        if self.current + size > self.peak.bytes:
            self._mark(self.current + size, where)

    def _mark(self, size: int, where: str) -> None:
        peak = self.peak
        peak.bytes, peak.saved_bytes, peak.grad_bytes, peak.where = size, self.saved_bytes, self.grad_bytes, where

    def _free(self, size: int, key: str) -> None:
        self.current -= size
        if self.events is not None:
            self.events.append((key, -size))

    def start_phase(self) -> None:
        """Forget the peak so far."""
        self.peak = Watermark(self.current, self.saved_bytes, self.grad_bytes, self.region.name)


def _stopping_point(ops: tuple[Op, ...], saves: list[tuple[Tensor, ...]]) -> tuple[int, bool]:
    """Where a non-reentrant recomputation stops: (index of the last op that saves something, whether it runs)."""
    for i in range(len(ops) - 1, -1, -1):
        if saves[i]:
            inputs = {t.name for t in ops[i].ins}
            return i, any(t.name not in inputs for t in saves[i])
    return 0, False
