"""Nothing is recomputed: everything that backward needs is kept.

With `--offload activations` it waits in pinned host memory: TRL 1.16's OffloadActivations (models/
activation_offloading.py), which is torchtune's, and Axolotl's for adapters. What a node saves is copied to the host,
all of it that has 1 KiB or more and is no parameter, each time it is saved, but not what the head saves; it comes back
as new tensors for the node's backward.
Modelled is `use_streams=False` (Axolotl's `legacy`). By default copies run on a stream of their own: at most five
tensors saved last are still on their way, what is saved again within five stays on the device, and tensors that came
back live for one node longer: errs low.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peftplan.graph.core import Region
from peftplan.recompute.base import Checkpoint, Recompute

LEAST_BYTES = 1024
"""min_offload_size."""


@final
@dataclass(frozen=True)
class Nothing(Recompute):
    layers = False

    def checkpoint(self, region: Region, index: int, depth: int) -> Checkpoint | None:
        del region, index, depth
        return None

    @property
    def least_sent_bytes(self) -> int | None:
        return LEAST_BYTES if self.offload else None


RECOMPUTE = Nothing
EXAMPLES = (Nothing(), Nothing(offload=True))
UNVERIFIED: tuple[str, ...] = ()
