"""What a region keeps for its backward: counted by storage, freed by the node that releases it last."""

from __future__ import annotations

from typing import NamedTuple

from peftplan.graph.core import ACTIVATION, INPUT, Op, Tensor, is_global
from peftplan.step.walk.account import Account
from peftplan.step.walk.plan import Plan


class Saved(NamedTuple):
    """One storage kept for backward, and the op that keeps it."""

    op: str
    tensor: Tensor
    bytes: int


class Kept:
    """Storages that autograd's nodes keep (`counts`), that nodes stash themselves (`pinned`), and that are part of
    the model's output (`returned`)."""

    __slots__ = ("_least_sent", "account", "bytes", "counts", "pinned", "plan", "returned", "saved", "sent")

    def __init__(self, plan: Plan, account: Account, *, least_sent_bytes: int | None = None) -> None:
        self.plan = plan
        self.account = account
        self.counts: dict[str, int] = {}
        """How many nodes have yet to release each storage; 0 once they all have."""
        self.bytes: dict[str, int] = {}
        self.pinned: dict[str, int] = {}
        self.returned: dict[str, int] = {}
        self.saved: list[Saved] = []
        self._least_sent = least_sent_bytes
        self.sent: list[Saved] = []
        """What went to the host instead, each time that a node saved it."""

    @property
    def sends(self) -> bool:
        """Whether anything may wait in host memory."""
        return self._least_sent is not None

    def away(self, op: Op, saves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What of `saves` waits in host memory."""
        least = self._least_sent
        if least is None or op.site == "head":
            return ()
        return tuple(t for t in saves if t.kind in (ACTIVATION, INPUT) and t.nbytes >= least)

    def holds(self, storage: str) -> bool:
        return storage in self.counts or storage in self.pinned

    def keep(self, op: Op, saves: tuple[Tensor, ...], live: dict[str, int]) -> None:
        """`op` saves these, each once more."""
        counts = self.counts
        if self._least_sent is not None:
            gone = self.away(op, saves)
            self.sent += [Saved(op.name, t, t.nbytes) for t in gone]
            saves = tuple(t for t in saves if t not in gone)
        for t in saves:
            storage = t.base or t.name
            if t.kind != ACTIVATION:
                if t.kind == INPUT and storage not in counts:
                    counts[storage] = 0
                    self.saved.append(Saved(op.name, t, t.nbytes))
                continue
            count = counts.get(storage, 0)
            counts[storage] = count + 1
            if not count:
                self._first(op, t, storage, live)

    def _first(self, op: Op, t: Tensor, storage: str, live: dict[str, int]) -> None:
        size = live.get(storage)
        if size is None and (is_global(storage) or self._is_entry(storage)):
            size = 0  # somebody else's to free
        elif size is None:  # made by the op's own kernel
            size = self.plan.size(t.nbytes)
            self.account.alloc(size, op.name, storage)
        self.bytes[storage] = size
        if storage not in self.pinned:
            self.account.saved_bytes += size
            self._note(op.name, t, storage)

    def _is_entry(self, storage: str) -> bool:
        entry = self.plan.region.entry
        return entry is not None and storage == entry.storage

    def _note(self, op: str, t: Tensor, storage: str) -> None:
        entry = self.plan.region.entry
        request = self.plan.request_bytes.get(storage)
        if request is None and entry is not None and storage == entry.storage:  # all of it, where t is a part
            request = entry.nbytes
        self.saved.append(Saved(op, t, request if request is not None else t.nbytes))

    def release(self, saves: tuple[Tensor, ...]) -> None:
        """A node is done with what it saved."""
        for t in saves:
            if t.kind != ACTIVATION:
                continue
            storage = t.base or t.name
            left = self.counts[storage] - 1
            self.counts[storage] = left
            if left == 0:
                self._last(storage)

    def _last(self, storage: str) -> None:
        size = self.bytes.pop(storage)
        if storage in self.pinned:
            return
        self.account.saved_bytes -= size
        if storage not in self.returned:
            self.account.free(size, storage)

    # -- stashed by Python functions ----------------------------------------------------------------------------

    def pin(self, t: Tensor, live: dict[str, int], *, owns_entry: bool) -> None:
        """A stashed value: alive until `drop_pinned`, whatever backward releases."""
        storage = t.storage
        if t.kind != ACTIVATION or storage in self.pinned:
            return
        size = live.get(storage, 0)
        self.pinned[storage] = size
        if storage not in self.counts and (size or owns_entry):
            self.account.saved_bytes += size
            self._note("stash", t, storage)

    def pin_whole(self, storage: str, live: dict[str, int]) -> None:
        """A value that somebody holds on to, whoever else does: alive until `drop_pinned`."""
        size = live.get(storage, self.bytes.get(storage))
        if size is not None and storage not in self.pinned:
            self.pinned[storage] = size
            self.account.saved_bytes += size if storage not in self.counts else 0

    def forget_pinned(self) -> int:
        """Stop tracking what is pinned: the bytes stay in the account until whoever asks frees them."""
        total = sum(self.pinned.values())
        self.pinned.clear()
        return total

    def drop_pinned(self) -> None:
        """The graph dies, and with it what its nodes stashed."""
        for storage, size in self.pinned.items():
            self.account.saved_bytes -= size
            self.account.free(size, storage)
        self.pinned.clear()

    # -- the model's output -------------------------------------------------------------------------------------

    def drop_returned(self) -> None:
        """The model's output goes out of scope; what autograd keeps of it stays."""
        for storage, size in self.returned.items():
            if storage not in self.bytes:
                self.account.free(size, storage)
        self.returned.clear()
