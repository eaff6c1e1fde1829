"""What a training process holds on the GPU besides tensors: CUDA context and library workspaces.

Each figure carries its source and whether it was checked there. cuBLAS and cuBLASLt workspaces are taken from
torch's caching allocator, so they are inside memory_allocated; the CUDA context is outside of it and only
nvidia-smi and cudaMemGetInfo see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftplan.units import KIB, MIB

Capability = tuple[int, int]
"""CUDA compute capability, such as (8, 0) for A100."""
Standing = Literal["measured", "read in source", "recalled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One overhead in bytes, where it comes from and how sure it is."""

    name: str
    bytes: int
    standing: Standing
    source: str
    date: str
    errs: str = "exact"
    """Which way it errs for a setup other than the source's."""


HANDLES = 2
"""cuBLAS handles of a training process: the forward thread's and the autograd engine's.

torch keeps a workspace per (handle, stream) and a handle per thread (ATen/cuda/CublasHandlePool.cpp). Two is
what the phase peaks of fitcheck's T4 rows and fms-acceleration's A100 rows hold, to 0.1 MiB (2026-09).
"""

_CUBLAS = Figure(
    name="cuBLAS workspace",
    bytes=4096 * KIB * 2 + 16 * KIB * 8,
    standing="measured",
    source="CublasHandlePool.cpp parseChosenWorkspaceSize, CUBLAS_WORKSPACE_CONFIG default :4096:2:16:8; "
    "16.25 MiB for two on T4 (fitcheck, torch 2.10 and 2.14) and A100 (fms-acceleration, torch 2.4.1)",
    date="2026-09",
)
_CUBLAS_SM90 = Figure(
    name="cuBLAS workspace",
    bytes=32 * MIB,
    standing="read in source",
    source="CublasHandlePool.cpp parseChosenWorkspaceSize: 4096 * 8 KiB where the capability is 9.0",
    date="2025-11",
)
_CUBLASLT = Figure(
    name="cuBLASLt workspace",
    bytes=1024 * KIB,
    standing="measured",
    source="CublasHandlePool.cpp parseCUDABlasLtWorkspaceSize, 1,024 KiB default, a pool of its own unless "
    "TORCH_CUBLASLT_UNIFIED_WORKSPACE is set; +2.0 MiB on every Qwen2.5 row of fitcheck (biased q, k, v)",
    date="2026-09",
)
_CONTEXT_T4 = Figure(
    name="CUDA context",
    bytes=int(140.875 * MIB),
    standing="measured",
    source="fitcheck-llm 0.3.1, cudaMemGetInfo minus reserved after the measured steps on a T4, torch "
    "2.10+cu128 and 2.14+cu130, with or without bitsandbytes; torch-preflight reads 134.875 MiB (2.11)",
    date="2026-09",
)
_CONTEXT_ADA = Figure(
    name="CUDA context",
    bytes=426 * MIB,
    standing="measured",
    source="nvidia-smi after torch.cuda.mem_get_info on an RTX 6000 Ada, torch 2.10+cu130 "
    "(github.com/unslothai/unsloth-zoo pull 1053)",
    date="2026-08",
    errs="low by the kernels that training then loads (36 MiB on a T4)",
)
_CONTEXT_OTHER = Figure(
    name="CUDA context",
    bytes=480 * MIB,
    standing="recalled",
    source="A100 and H100 processes show 400 to 550 MiB in nvidia-smi with lazily loaded modules; torch "
    "maintainers say around 400 MB (github.com/pytorch/pytorch issue 109888, 2023-09)",
    date="2026-11-21",
    errs="either way by up to 100 MiB; before CUDA 11.7 low by some 500 MiB, as every kernel was loaded",
)


_NCCL = {
    ranks: Figure(
        name="NCCL communicator",
        bytes=size * MIB,
        standing="measured",
        source="github.com/NVIDIA/nccl issue 964: nvidia-smi around groups of 4 A100 with NVLink, one all-reduce; "
        f"{size} MB with {'2' if ranks == 2 else 'more than 2'} ranks",
        date="2023-08",
        errs="either way: grows with the channels that links ask for (less over PCIe, more on H100)",
    )
    for ranks, size in ((2, 544), (3, 688))
}


def nccl_communicator(ranks: int) -> Figure:
    """What NCCL holds outside torch's allocator for one group of `ranks`, from its first collective on."""
    return _NCCL[min(ranks, 3)]


def cublas_workspace(capability: Capability | None) -> Figure:
    """torch's workspace of one cuBLAS handle; an unknown GPU gets the one that all but Hopper have."""
    return _CUBLAS_SM90 if capability == (9, 0) else _CUBLAS


def cublaslt_workspace() -> Figure:
    """torch's workspace of one cuBLASLt handle: in use when a linear layer adds a bias (addmm's epilogue)."""
    return _CUBLASLT


def cuda_context(capability: Capability | None) -> Figure:
    """What the process holds outside the caching allocator once training has run its first step."""
    if capability == (7, 5):
        return _CONTEXT_T4
    return _CONTEXT_ADA if capability == (8, 9) else _CONTEXT_OTHER


def workspace_bytes(capability: Capability | None, *, biased_linears: bool, recomputes: bool = True) -> int:
    """Library workspaces inside memory_allocated during training: one per handle of each library in use.

    Biases are added in forward passes only, so the autograd thread has a cuBLASLt handle only where it recomputes.
    """
    lt_handles = biased_linears * (HANDLES if recomputes else 1)
    return HANDLES * cublas_workspace(capability).bytes + lt_handles * cublaslt_workspace().bytes
