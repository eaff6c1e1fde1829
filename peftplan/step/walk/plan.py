"""What is known of a region before anything runs: sizes, last uses, and which values require a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from peftplan.graph.core import ACTIVATION, Op, Region, Tensor
from peftplan.graph.ops import WeightCast


class Plan:
    """What the walks of one region share. `size` says how many bytes a request counts for."""

    __slots__ = ("last_use", "loss_start", "made_globals", "out_bytes", "region", "request_bytes", "scratch_bytes",
                 "size", "stashes", "weight_casts")  # fmt: skip

    def __init__(self, region: Region, size: Callable[[int], int]) -> None:
        ops = region.ops
        self.region = region
        self.size = size
        self.out_bytes: list[int] = []
        """Per op: bytes its output takes, 0 for views."""
        self.request_bytes: dict[str, int] = {}
        """Of every storage that the region makes."""
        self.last_use = self._uses(ops)
        """Per op: the storages it uses last."""
        self.scratch_bytes = [op.scratch_bytes() for op in ops]
        self.weight_casts = tuple([op for op in ops if type(op) is WeightCast])
        self.stashes = any(op.stashes for op in ops)
        self.loss_start = next((i for i, op in enumerate(ops) if op.site == "loss"), None) if region.is_head else None
        """The first op of the loss."""
        self.made_globals = {n: size(r) for n, r in self.request_bytes.items() if n[0] == "@"}
        """Values made here for the whole model, with their bytes."""

    def storage_bytes(self, name: str) -> int:
        """Bytes of a storage that the region makes, or enters with."""
        entry = self.region.entry
        if entry is not None and name == entry.storage:
            return self.size(entry.nbytes)
        return self.size(self.request_bytes[name])

    def _uses(self, ops: Sequence[Op]) -> list[list[str]]:
        size, requests, outs = self.size, self.request_bytes, self.out_bytes
        last: dict[str, int] = {}
        for i, op in enumerate(ops):
            for t in op.ins:
                if t.kind == ACTIVATION:
                    last[t.base or t.name] = i
            out = op.out
            if out.base:
                outs.append(0)
                continue
            name = out.name
            requests[name] = request = out.nbytes
            outs.append(size(request))
            if name not in last:
                last[name] = i
        uses: list[list[str]] = [[] for _ in ops]
        for storage, i in last.items():
            if storage[0] != "@":
                uses[i].append(storage)
        return uses


def propagate_need(region: Region, *, entry_needs: bool, also: Iterable[str] = ()) -> set[str]:
    """Names of the region's values that require a gradient."""
    need: set[str] = set(also)
    if entry_needs and region.entry is not None:
        need.add(region.entry.name)
    for op in region.ops:
        wanted = False
        for t in op.ins:
            if t.trainable:
                need.add(t.name)
                wanted = True
            elif t.name in need:
                wanted = True
        if wanted and op.differentiable:
            need.add(op.out.name)
    return need


def stopping_point(ops: Sequence[Op], saves: Sequence[tuple[Tensor, ...]]) -> tuple[int, bool]:
    """Where a non-reentrant recomputation stops: (index of the last op that saves something, whether it runs).

    Before running it if what it saves are its inputs (torch/utils/checkpoint.py, _StopRecomputationError).
    """
    for i in range(len(ops) - 1, -1, -1):
        if saves[i]:
            inputs = {t.name for t in ops[i].ins}
            return i, ops[i].saves_late or any(t.name not in inputs for t in saves[i])
    return 0, False
