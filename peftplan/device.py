"""From what tensors need to what must fit on the card: allocator, library workspaces, CUDA context."""

from __future__ import annotations

from dataclasses import dataclass

from peftplan.graph.core import Graph
from peftplan.graph.ops import Linear, PackedLinear
from peftplan.hardware.gpus import Gpu
from peftplan.hardware.overheads import Capability, cuda_context, workspace_bytes
from peftplan.result import Assumption


@dataclass(frozen=True, kw_only=True, slots=True)
class OnDevice:
    """Bytes that nvidia-smi would show for the process at its fullest, and what they rest on."""

    bytes: int
    notes: tuple[Assumption, ...]


def on_device(
    *, peak_bytes: int, reserved_bytes: int | None, gpu: Gpu | None, biased_linears: bool
) -> OnDevice:
    """What the caching allocator holds, plus the CUDA context.

    The workspaces of cuBLAS and cuBLASLt come out of the allocator, so a known `reserved_bytes` holds them
    already. Where it is unknown, the peak of tensors with the workspaces stands in for it: errs low by
    fragmentation, by up to 12 % near a full card.
    """
    level = capability(gpu)
    context = cuda_context(level)
    notes = [
        Assumption(what="context_bytes", value=context.bytes, why=f"{context.standing}; errs {context.errs}")
    ]
    held = reserved_bytes
    if held is None:
        workspaces = workspace_bytes(level, biased_linears=biased_linears)
        held = peak_bytes + workspaces
        notes.append(
            Assumption(what="workspace_bytes", value=workspaces, why="cuBLAS and cuBLASLt, two handles")
        )
        notes.append(
            Assumption(
                what="memory.device_bytes",
                value=held + context.bytes,
                why="counts allocated bytes, not those the allocator reserves: errs low",
            )
        )
    return OnDevice(bytes=held + context.bytes, notes=tuple(notes))


def capability(gpu: Gpu | None) -> Capability | None:
    """(8, 0) of `8.0`; None where the card is unknown or not NVIDIA's."""
    major, _, minor = ((gpu.compute_capability if gpu is not None else None) or "").partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def has_biased_linears(graph: Graph) -> bool:
    """Whether some linear layer adds a bias, which is what takes cuBLASLt into use."""
    return any(
        len(op.ins) > 2 and isinstance(op, (Linear, PackedLinear)) for r in graph.regions for op in r.ops
    )
