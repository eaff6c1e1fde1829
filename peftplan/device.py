"""From what torch allocates to what must fit on the card, and what decides on library workspaces."""

from __future__ import annotations

from dataclasses import dataclass

from peftplan.graph.core import Graph
from peftplan.graph.ops import Linear, PackedLinear
from peftplan.hardware.gpus import Gpu
from peftplan.hardware.overheads import cuda_context
from peftplan.result import Assumption


@dataclass(frozen=True, kw_only=True, slots=True)
class OnDevice:
    """Bytes that nvidia-smi would show for the process at its fullest, and what they rest on."""

    bytes: int
    notes: tuple[Assumption, ...]


def on_device(*, peak_bytes: int, reserved_bytes: int | None, gpu: Gpu | None) -> OnDevice:
    """What the caching allocator holds, plus the CUDA context.

    The workspaces of cuBLAS and cuBLASLt come out of the allocator: the peak and what is reserved hold them
    already. Where reserved bytes are unknown, the peak stands in for them: errs low by fragmentation, by 3 to
    30 % over fitcheck's T4 rows (2026-11), most with eager attention.
    """
    context = cuda_context(gpu.capability if gpu is not None else None)
    notes = [Assumption(what="context_bytes", value=context.bytes, why=f"{context.standing}; errs {context.errs}")]
    total = (peak_bytes if reserved_bytes is None else reserved_bytes) + context.bytes
    if reserved_bytes is None:
        why = "counts allocated bytes, not those the allocator reserves: errs low"
        notes.append(Assumption(what="memory.device_bytes", value=total, why=why))
    return OnDevice(bytes=total, notes=tuple(notes))


def has_biased_linears(graph: Graph) -> bool:
    """Whether some linear layer adds a bias, which is what takes cuBLASLt into use."""
    return any(len(op.ins) > 2 and isinstance(op, (Linear, PackedLinear)) for r in graph.regions for op in r.ops)
