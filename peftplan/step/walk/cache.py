"""Results of a checkpointed region that selective checkpointing keeps for its second run."""

from __future__ import annotations

from peftplan.graph.core import Op
from peftplan.step.walk.account import Account
from peftplan.step.walk.kept import Saved
from peftplan.step.walk.plan import Plan


class Cache:
    """What torch.utils.checkpoint's dispatch modes hold: all that a kept op returns, wanted by backward or not, until
    the second run is handed it instead of computing it (create_selective_checkpoint_contexts). What that run does not
    come to stays until the region's backward is done."""

    __slots__ = ("_account", "_bytes", "_plan", "indices", "saved")

    def __init__(self, plan: Plan, account: Account, indices: frozenset[int]) -> None:
        self._plan = plan
        self._account = account
        self._bytes: dict[str, int] = {}
        self.indices = indices
        self.saved: list[Saved] = []
        """What is held beyond the forward."""

    def storages(self) -> set[str]:
        """What does not die in the forward."""
        ops = self._plan.region.ops
        return {t.storage for i in self.indices for t in ops[i].returned()}

    def put(self, op: Op, live: dict[str, int]) -> None:
        """The first run has computed `op`."""
        for t in op.returned():
            size = live.get(t.storage)
            if size is None:  # made by the op's own kernel
                size = live[t.storage] = self._plan.size(t.nbytes)
                self._account.alloc(size, op.name, t.storage)
            self._bytes[t.storage] = size
            self._account.saved_bytes += size
            self.saved.append(Saved(op.name, t, self._plan.request_bytes.get(t.storage, t.nbytes)))

    def take(self, op: Op, live: dict[str, int]) -> None:
        """The second run has come to `op`: what it returned is a value of that run now."""
        for t in op.returned():
            live[t.storage] = size = self._bytes.pop(t.storage)
            self._account.saved_bytes -= size

    def drop(self) -> None:
        """The region's backward is done."""
        for storage, size in self._bytes.items():
            self._account.saved_bytes -= size
            self._account.free(size, storage)
        self._bytes.clear()
