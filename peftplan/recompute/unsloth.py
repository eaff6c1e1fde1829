"""Unsloth's checkpoints: the layers' inputs wait in pinned host memory, all but the last layer's, and those of at most
2 MiB.

Mirrors unsloth_zoo 2026.10.9, gradient_checkpointing.py (UnslothCheckpointFunction, which stands in for both of torch's
flavours): a layer runs again as a whole, as CheckpointFunction does it; its input is copied on a stream of its own
while the layer computes, float32 as bfloat16, and comes back into one of two buffers that live on. Read, not run: it
needs a GPU; tests/oracles/test_recompute.py holds a reference of it.
The second buffer, which Unsloth leaves out where less than 512 MiB are free after the first step, is counted. Not
modelled: what is pinned beyond need, 200 host buffers of 256 KiB at first and each rounded up to a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Graph, Region
from peftplan.recompute.base import Checkpoint, Recompute
from peftplan.units import MIB, DType

LEAST_BYTES = 2 * MIB
"""MINIMUM_SIZE: what is larger is offloaded; and INITIAL_GPU_BUFFER_SIZE of 2-byte elements."""


@final
@dataclass(frozen=True)
class Unsloth(Recompute):
    uniform = False

    @property
    def reentrant(self) -> bool:
        return True

    def checkpoint(self, region: Region, index: int, depth: int) -> Checkpoint | None:
        if index == depth - 1 or _stored_bytes(region) <= LEAST_BYTES:
            return Checkpoint(reentrant=True)
        as_bf16 = region.entry is not None and region.entry.dtype is DType.float32
        return Checkpoint(
            reentrant=True, offloaded=True, staged=True, beside=True, host_dtype=DType.bfloat16 if as_bf16 else None
        )

    def alike(self, index: int, depth: int, most: int) -> int:
        return min(most, max(1, depth - 1 - index))

    def buffers(self, graph: Graph) -> tuple[int, ...]:
        """The two that inputs come back into."""
        layers = [region for region in graph.regions if region.first_index is not None]
        depth = sum(region.count for region in layers)
        widest = max((_stored_bytes(region) for region in layers), default=0)
        return (widest, widest) if widest > LEAST_BYTES and depth > 1 else ()

    def refusal(self) -> str | None:
        return "recompute unsloth offloads by itself; leave --offload activations out" if self.offload else None


def _stored_bytes(region: Region) -> int:
    """Of a layer's input on the host."""
    entry = region.entry
    if entry is None:
        return 0
    return entry.numel * 2 if entry.dtype is DType.float32 else entry.nbytes


RECOMPUTE = Unsloth
EXAMPLES = (Unsloth(),)
UNVERIFIED = ("equality with the library's own run, which needs a GPU",)
