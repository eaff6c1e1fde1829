"""One region's forward and backward: who is alive when."""

from __future__ import annotations

from collections.abc import Iterator

from peftplan.graph.core import ACTIVATION, Op, Tensor
from peftplan.recompute.base import Checkpoint
from peftplan.step.walk.account import Account, Watermark
from peftplan.step.walk.cache import Cache
from peftplan.step.walk.gradients import Gradients
from peftplan.step.walk.kept import Kept, Saved
from peftplan.step.walk.plan import Plan, stopping_point
from peftplan.step.walk.updates import Updates
from peftplan.units import DType


class RegionWalk:
    """The state of one region: `forward` keeps storages, `backward` gives them back.

    `checkpoint`: nothing is kept but what that caches, and the forward runs again in backward. A checkpoint holds its
    layer's input, so it does not die in the region. `grads_exist` says that parameter
    gradients are already allocated (accumulation); `global_grads` holds the bytes of those shared with other regions;
    `updates` lets gradients go as they arrive.
    """

    def __init__(
        self,
        plan: Plan,
        need: set[str],
        *,
        account: Account | None = None,
        checkpoint: Checkpoint | None = None,
        grads_exist: bool = False,
        global_grads: dict[str, int] | None = None,
        updates: Updates | None = None,
        least_sent_bytes: int | None = None,
    ) -> None:
        self.plan = plan
        self.region = plan.region
        self.need = need
        self.account = account if account is not None else Account()
        self.kept = Kept(plan, self.account, least_sent_bytes=least_sent_bytes)
        self.checkpointed = checkpoint is not None
        self.reentrant = checkpoint is not None and checkpoint.reentrant
        self.offloaded = checkpoint is not None and checkpoint.offloaded
        self.beside = checkpoint is not None and checkpoint.beside
        self._host_dtype = checkpoint.host_dtype if checkpoint is not None else None
        self._staged = checkpoint is not None and checkpoint.staged and checkpoint.host_dtype is None
        self.cache = Cache(plan, self.account, checkpoint.cached if checkpoint is not None else frozenset())
        self.gradients = Gradients(
            self.account,
            self.kept,
            need,
            global_grads=global_grads if global_grads is not None else {},
            grads_exist=grads_exist,
            updates=updates,
        )
        self.cached_names: tuple[str, ...] = ()
        self.cached_bytes = 0
        """Autocast's copies of weights that nobody keeps for backward: they go when the forward has ended."""
        self.before_loss: Watermark | None = None
        """The peak before the first op of the loss, in the region that holds the loss."""
        self.pinned_bytes = 0
        """What the region still holds when its backward is done, until the loss dies."""
        self.taken_grad_bytes = 0
        """Gradients of what the region took, alive until they meet in the one that handed it on."""
        self.parts_grad_bytes = 0
        """Those of all regions that took their parts of what this one handed on."""
        leaf = self.region.leaf
        self._leaf = leaf if leaf in need and not self._computed(leaf) else None
        """A value that accumulates its gradient like a parameter."""
        self._saves = [op.saved(need) for op in self.region.ops]

    def _computed(self, name: str) -> bool:
        """Whether a gradient flows on from a value: to what it was made of, a trained embedding."""
        return any(t.name in self.need for op in self.region.ops if op.out.name == name for t in op.ins)

    # -- forward ------------------------------------------------------------------------------------------------

    def start_phase(self) -> None:
        """Forget the peak so far."""
        self.account.start_phase(self.region.name)

    def forward(self) -> None:
        """Run the ops; what they save stays alive, unless the region is checkpointed."""
        owns = self.offloaded or not self.checkpointed
        self._forward(keep=not self.checkpointed, stash=not (self.checkpointed and self.reentrant), owns_entry=owns)

    def _forward(self, *, keep: bool, stash: bool, owns_entry: bool = False) -> None:
        region, counts = self.region, self.kept.counts
        live = self._alive_on_entry(owned=owns_entry)
        cached = self._cached()
        staying = {region.exit.storage, *cached, *self._held(), *self.cache.storages()}
        count = len(region.ops)
        self._run(live, staying, region.returned, seen=count, run=count, keep=keep, stash=stash)
        self.cached_names = tuple(name for name in cached if name in live and name not in counts)
        self.cached_bytes = sum(live[name] for name in self.cached_names)
        if self._leaf is not None:
            self._count_leaf()
        for name in self._lingering():
            self.account.saved_bytes += live[name]
            self.kept.saved.append(Saved("lingers", Tensor(name, (), DType.boolean), self.plan.request_bytes[name]))

    def _recompute(self) -> None:
        """The forward again, up to where non-reentrant recomputation stops. The graph that it makes holds what its
        nodes stash until it is thrown away."""
        live = self._alive_on_entry(owned=self.offloaded)
        arguments = self._reloaded()
        stashed = (t.storage for op in self.region.ops for t in op.stashed(self.need)) if self.plan.stashes else ()
        stop, run_last = stopping_point(self.region.ops, self._saves)
        staying = {*self._cached(), *self._held(), *self.region.trails, *stashed, *arguments}
        self._run(live, staying, (), seen=stop + 1, run=stop + run_last, keep=True, stash=False)
        for name in self._trailing():
            self.kept.pin_whole(name, live)
        for storage, size in live.items():
            if not self.kept.holds(storage):
                self.account.free(size, storage)

    def _reloaded(self) -> tuple[str, ...]:
        """The input comes back from the host: an argument of the second run, which holds it to its end."""
        entry = self.region.entry
        if not self.offloaded or entry is None or self._staged:
            return ()
        self.account.alloc(self.plan.size(entry.nbytes), "reload", entry.storage)
        return (entry.storage,)

    def _trailing(self) -> Iterator[str]:
        """What is held on to after the forward has run again, with what the nodes that made it save."""
        names = self.region.trails
        yield from names
        last = max((i for i, op in enumerate(self.region.ops) if op.out.name in names), default=-1)
        yield from (t.storage for saves in self._saves[: last + 1] for t in saves if t.kind == ACTIVATION)

    def _run(
        self,
        live: dict[str, int],
        staying: set[str],
        returned: tuple[str, ...],
        *,
        seen: int,
        run: int,
        keep: bool,
        stash: bool,
    ) -> None:
        """The first `run` ops, and what the first `seen` save and use last. `live` holds storages with their bytes;
        those in `staying` do not die after their last use, those in `returned` become part of the model's output."""
        plan, account, kept, kept_ops = self.plan, self.account, self.kept, self.cache.indices
        out_bytes, scratch_bytes, last_use, saves = plan.out_bytes, plan.scratch_bytes, plan.last_use, self._saves
        for i, op in enumerate(self.region.ops[:seen]):
            if i == plan.loss_start and self.before_loss is None:
                self.before_loss = account.peak
                self.start_phase()
            if i in kept_ops and i < run and keep:
                self._take(op, live)
            elif i < run:
                size, scratch = out_bytes[i], scratch_bytes[i]
                if size:
                    name = op.out.name
                    live[name] = size
                    if scratch and not op.output_first:
                        account.compose(size, op.name, name, scratch=scratch, pieces=op.pieces)
                        scratch = 0
                    else:
                        account.alloc(size, op.name, name)
                if scratch:
                    account.touch(scratch, op.name)
                if i in kept_ops:
                    self.cache.put(op, live)
            if keep and saves[i]:
                kept.keep(op, saves[i], live)
            if stash and plan.stashes:
                for t in op.stashed(self.need):
                    kept.pin(t, live, owns_entry=not self.checkpointed)
            for storage in last_use[i]:
                if storage in staying:
                    continue
                size = live.pop(storage, 0)
                if storage in returned:
                    kept.returned[storage] = size
                elif size and storage not in kept.counts and storage not in kept.pinned:
                    account.free(size, storage)

    def _take(self, op: Op, live: dict[str, int]) -> None:
        """The second run is handed what the first kept; what runs before the kernel runs again."""
        prepared = op.prepared_bytes()
        if prepared:
            self.account.touch(prepared, op.name)
        self.cache.take(op, live)

    def _alive_on_entry(self, *, owned: bool) -> dict[str, int]:
        """`owned`: the entry is this run's to let go of, or to keep."""
        entry, size = self.region.entry, self.plan.size
        live = {entry.storage: size(entry.nbytes)} if entry is not None and owned else {}
        for t in self.region.taken:
            live[t.storage] = size(t.nbytes)
        return live

    def _cached(self) -> list[str]:
        return [op.out.name for op in self.plan.weight_casts if op.cached]

    def _held(self) -> tuple[str, ...]:
        """Values that others hold beyond this region; a leaf is held by the node that accumulates its gradient."""
        held = (*self.region.held, *self.region.handed, *self._lingering())
        return held if self._leaf is None else (*held, self._leaf)

    def _lingering(self) -> tuple[str, ...]:
        return self.region.lingers if self.checkpointed else ()

    def _count_leaf(self) -> None:
        """A leaf that accumulates a gradient lives as long as the graph, which counts as kept for backward."""
        for op in self.region.ops:
            if op.out.name == self._leaf:
                self.account.saved_bytes += self.plan.size(op.out.nbytes)
                self.kept.saved.append(Saved(op.name, op.out, op.out.nbytes))

    # -- between ------------------------------------------------------------------------------------------------

    @property
    def saved(self) -> list[Saved]:
        """What the region keeps for backward."""
        return [*self.kept.saved, *self.cache.saved] if self.cache.saved else self.kept.saved

    @property
    def sent(self) -> list[Saved]:
        """What waits in host memory for the region's backward."""
        entry = self.region.entry
        if not self.offloaded or entry is None:
            return self.kept.sent
        held = entry._replace(dtype=self._host_dtype or entry.dtype)
        return [Saved("checkpoint", held, held.nbytes)]

    @property
    def entry_saved(self) -> bool:
        """Whether an op of the region keeps the entry for its backward."""
        return self.region.entry is not None and self.keeps(self.region.entry.storage)

    def keeps(self, storage: str) -> bool:
        """Whether backward needs, or needed, a storage of this region."""
        return storage in self.kept.counts

    def drop_held(self) -> None:
        """The model's forward has returned to the caller that held these; what autograd keeps of them stays."""
        for storage in self.region.held:
            if not self.keeps(storage) and storage != self.region.exit.storage:
                self.account.free(self.plan.storage_bytes(storage), storage)

    def drop_cached(self) -> None:
        """Autocast ends, and with it its cache."""
        self.account.current -= self.cached_bytes

    def drop_returned(self) -> None:
        """The model's output goes out of scope; what autograd keeps of it stays."""
        self.kept.drop_returned()

    # -- backward -----------------------------------------------------------------------------------------------

    def recomputed_ops(self) -> list[int]:
        """Indices of the ops that a recomputation runs."""
        run = len(self.region.ops)
        if not self.reentrant:
            stop, run_last = stopping_point(self.region.ops, self._saves)
            run = stop + run_last
        return [i for i in range(run) if i not in self.cache.indices]

    def backward(self, *, root: bool = False) -> bool:
        """Run the ops backward from the gradient of the exit, which is alive on entry. Returns whether the entry
        got a gradient, which is then alive on return. The engine itself holds the gradient of a `root`."""
        if not self.checkpointed:
            self._backward(root=root)
            self.pinned_bytes = self.kept.forget_pinned()
        else:
            self.pinned_bytes = self.kept.forget_pinned()
            for name in self._lingering():
                self.account.saved_bytes -= self.plan.storage_bytes(name)
                self.account.free(self.plan.storage_bytes(name), name)
            arguments = self._reloaded() if self.reentrant else ()
            if self.reentrant:
                self._forward(keep=True, stash=True)
            self._backward(root=root, recompute=not self.reentrant)
            for name in arguments:  # CheckpointFunction.backward holds them to its end
                self.account.free(self.plan.storage_bytes(name), name)
            self.cache.drop()
            self.kept.drop_pinned()
        return self.entry_gradient is not None

    def _backward(self, *, root: bool = False, recompute: bool = False) -> None:
        """With `recompute`, the forward runs again when the first saved tensor is asked for."""
        region, gradients, saves = self.region, self.gradients, self._saves
        flowing = gradients.flowing
        if region.exit.name in self.need:
            gradients.enter(region.exit, root=root)
        gradients.take_met()
        for name in region.handed:  # its parts' gradients meet in one
            if name in self.need:
                whole = next(op.out for op in region.ops if op.out.name == name)
                flowing[name] = gradients.make(whole.logical_bytes, name)
        self.account.current -= self.parts_grad_bytes
        recomputed = False
        for i in range(len(region.ops) - 1, -1, -1):
            op = region.ops[i]
            incoming = flowing.pop(op.out.name, None)
            if incoming is None:
                continue
            if op.out.name == self._leaf:
                gradients.settle(op.out, incoming)
                continue
            if recompute and not recomputed and saves[i]:
                recomputed = True
                self._recompute()
            gradients.node(op, saves[i], incoming, recomputed=recomputed)
        self.taken_grad_bytes = sum(flowing[t.name].bytes for t in region.taken if t.name in flowing)

    @property
    def entry_gradient(self) -> str | None:
        """The event key of the entry's gradient, where backward has made one."""
        entry = self.region.entry
        found = self.gradients.flowing.get(entry.name) if entry is not None else None
        return found.key if found is not None else None
