"""The accelerator catalog (`gpus.jsonl` beside this file).

Compiled from public sources up to November 2026; each row lists its own. A source that begins with "recalled"
names a figure known from the vendor's datasheets or from use, for which no published file was read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

_DATA = Path(__file__).with_name("gpus.jsonl")

Rate = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMemory:
    """Three readings of one card's memory, largest to smallest on most cards."""

    marketed_bytes: int
    """The number on the box, read as decimal gigabytes."""
    driver_total_bytes: int | None
    """What nvidia-smi or its like reports."""
    driver_total_source: str | None
    torch_total_bytes: int | None
    """`torch.cuda.get_device_properties().total_memory`: what the driver leaves a process."""
    torch_total_source: str | None
    unified: bool
    """Shared with the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """Between the GPUs of a node; bytes per second of one GPU in one direction."""

    type: str
    bytes_per_second: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pcie:
    """To the host; bytes per second in one direction."""

    gen: int
    width: int
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """The machine it usually sits in; network bytes per second for each GPU."""

    gpus: int
    gpus_per_rack: int | None
    network: str
    network_bytes_per_second: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One accelerator as sold. Rates are peaks without sparsity."""

    name: str
    aliases: tuple[str, ...]
    vendor: str
    kind: Literal["gpu", "tpu", "asic"]
    architecture: str
    compute_capability: str | None
    memory: GpuMemory
    bandwidth_bytes_per_second: float
    dense_tflops: Mapping[Rate, float]
    """Peak 10^12 operations per second by element type; a missing type is unknown or not supported."""
    measured_bf16_tflops: float | None
    """The fastest matrix product found by search (stas00/ml-engineering, "MAMF")."""
    link: Link
    pcie: Pcie | None
    l2_bytes: int | None
    tdp_watts: float | None
    form_factor: str
    node: Node
    release_year: int
    sources: tuple[str, ...]
    notes: str

    @property
    def capability(self) -> tuple[int, int] | None:
        """The compute capability as (major, minor); None for what is not NVIDIA's."""
        major, _, minor = (self.compute_capability or "").partition(".")
        return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


@dataclass(frozen=True, kw_only=True, slots=True)
class UsableMemory:
    """Bytes a process can use of an empty card, and where the figure comes from; or why there is none."""

    bytes: int | None
    source: str


@lru_cache(maxsize=1)
def gpus() -> Sequence[Gpu]:
    """Every accelerator of the catalog, in the catalog's order."""
    with _DATA.open(encoding="utf-8") as lines:
        return tuple(_gpu(json.loads(line)) for line in lines)


def _gpu(row: dict[str, Any]) -> Gpu:
    row["aliases"] = tuple(row["aliases"])
    row["sources"] = tuple(row["sources"])
    row["memory"] = GpuMemory(**row["memory"])
    row["link"] = Link(**row["link"])
    row["pcie"] = row["pcie"] and Pcie(**row["pcie"])
    row["node"] = Node(**row["node"])
    return Gpu(**row)


def usable_bytes(gpu: Gpu) -> UsableMemory:
    """What torch reports as the card's total, else the driver's total, else the marketed size.

    The driver's total errs high by what the driver keeps (0 to 1.1 GiB on the cards where both are known);
    the marketed size in decimal gigabytes errs low. None for a card that shares its memory with
    the CPU, unless torch's total is known.
    """
    memory = gpu.memory
    if memory.torch_total_bytes is not None:
        return UsableMemory(bytes=memory.torch_total_bytes, source=f"torch's total: {memory.torch_total_source}")
    if memory.unified:
        return UsableMemory(
            bytes=None,
            source=f"{gpu.name} shares its memory with the CPU; a process's part depends on the machine",
        )
    if memory.driver_total_bytes is not None:
        return UsableMemory(bytes=memory.driver_total_bytes, source=f"driver's total: {memory.driver_total_source}")
    return UsableMemory(bytes=memory.marketed_bytes, source="marketed size, read as decimal GB")
