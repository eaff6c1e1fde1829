"""What a layout is: how replicas, their weights, their operations and their layers are spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from peftplan.arch.core import Arch, Attention
from peftplan.errors import RequestError
from peftplan.graph.mesh import ONE, Mesh

DataParallel = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"]
"""Who holds what of a replica's weights, gradients and optimizer states: `none` is one replica only."""
DATA_PARALLEL: tuple[DataParallel, ...] = get_args(DataParallel)
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]
"""Order of micro-batches in a pipeline: all forwards first (Huang 2019, arXiv:1811.06965); one forward, one backward
(Narayanan 2019, PipeDream-flush); the same with several chunks of layers a rank (Narayanan 2021, arXiv:2104.04473);
with weights' gradients put off (Qi 2023, arXiv:2401.10241)."""
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
Framework = Literal["torch", "megatron"]
"""Whose code spreads a replica: torch.distributed as torchtitan calls it (fully_shard, parallelize_module, pipelining),
or Megatron-Core."""
FRAMEWORKS: tuple[Framework, ...] = get_args(Framework)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One job's GPUs. `world` = dp x tp x cp x pp, the ranks of experts being some of those."""

    style: DataParallel = "none"
    dp: int = 1
    """Replicas of the model, each with batches of its own."""
    shards: int = 1
    """Replicas among which the style shards: `dp`, or fewer where groups of them hold copies (hybrid sharding)."""
    mesh: Mesh = ONE
    pp: int = 1
    """Stages of the pipeline."""
    schedule: Schedule = "1f1b"
    chunks: int = 1
    """Parts of the model that a rank of an interleaved pipeline holds."""
    uneven: bool = False
    """Whether stages may hold one layer more than others."""
    framework: Framework = "torch"

    @property
    def world(self) -> int:
        return self.dp * self.mesh.tp * self.mesh.cp * self.pp

    @property
    def replicates(self) -> int:
        """Groups that hold copies of the same shards."""
        return self.dp // self.shards

    @property
    def alone(self) -> bool:
        """Whether one GPU does everything."""
        return self.world == 1


SINGLE = Layout()


def unmodelled(layout: Layout) -> str | None:
    """What of a layout no figure is known for yet, or None."""
    mesh, megatron = layout.mesh, layout.framework == "megatron"
    shards = layout.dp > 1 and layout.style not in ("none", "ddp")
    missing = {
        f"{layout.style} under a pipeline": shards and layout.pp > 1 and not megatron,
        f"{layout.style} with tensor parallelism": shards and mesh.tp > 1 and layout.style != "fsdp2" and not megatron,
        "sequence parallelism": mesh.sequence and not megatron,
        "context parallelism": mesh.cp > 1 and not megatron,
        "expert parallelism": mesh.ep > 1,
    }
    return next((what for what, used in missing.items() if used), None)


def check(layout: Layout, arch: Arch, micro_batches: int, seq_len: int) -> None:
    """Raises RequestError, with what would be possible, where a model cannot be spread so."""
    mesh = layout.mesh
    for attention in {layer.attention for layer, _ in arch.layers}:
        _check_heads(mesh, attention)
    for size in {layer.mlp.size for layer, _ in arch.layers} if layout.framework == "megatron" else ():
        _divides("tp", mesh.tp, size, "the feed-forward width")
    _divides("cp", mesh.cp * (mesh.tp if mesh.sequence else 1), seq_len, "--seq-len")
    stages = layout.pp * layout.chunks
    if stages > 1 and not layout.uneven:
        _divides("pp", stages, arch.num_layers, "the number of layers", ", or set layout.uneven=true")
    if stages > arch.num_layers:
        raise RequestError(f"--layout pp={layout.pp}: {arch.num_layers} layers make no {stages} stages; use fewer")
    several = layout.schedule in ("interleaved", "zero_bubble")
    if several and micro_batches % max(1, micro_batches // layout.pp):
        raise RequestError(
            f"--grad-accum {micro_batches}: this pipeline takes micro-batches in multiples of pp={layout.pp}"
        )
    if layout.chunks > 1 and layout.schedule in ("gpipe", "1f1b"):
        raise RequestError(f"--layout vpp={layout.chunks}: {layout.schedule} runs one chunk of layers a rank")


def _check_heads(mesh: Mesh, attention: Attention) -> None:
    _divides("tp", mesh.tp, attention.heads, "the number of heads")
    _divides("tp", mesh.tp, attention.kv_heads, "the number of key-value heads")
    if mesh.context == "ulysses":
        _divides("cp", mesh.cp, attention.heads // mesh.tp, "the heads of a rank")


def _divides(key: str, degree: int, whole: int, what: str, fix: str = "") -> None:
    if degree <= 1 or whole % degree == 0:
        return
    legal = [d for d in range(1, whole + 1) if whole % d == 0]
    near = sorted(sorted(legal, key=lambda d: abs(d - degree))[:3])
    raise RequestError(
        f"--layout {key}={degree} does not divide {what}, {whole}; use {' or '.join(map(str, near))}{fix}"
    )
