"""How long collectives take: rings with a time for each hop and a bandwidth (Hockney's alpha and beta).

A ring moves (n - 1) / n of the whole over every link for an all-gather or a reduce-scatter, twice that for an
all-reduce. Hops and their start are NCCL's own model of its simple protocol (NVIDIA/nccl, src/graph/tuning.cc, baseLat
and hwLat; NVLink's read 2026-11, PCIe's and the network's recalled). Trees and switches that reduce are left out, which
errs high for small messages on many ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from peftplan.hardware.gpus import Gpu
from peftplan.layouts import Layout
from peftplan.layouts.units import Message

OF_LINK = 0.8
"""Bus bandwidth that collectives reach, of the link's. Recalled: nccl-tests show 230 to 240 of 300 GB/s on A100 and
some 360 of 450 GB/s on H100 with NVLink; errs either way by a fifth, high on PCIe without peer access."""
START_SECONDS = 8.4e-6
HOP_SECONDS = {"NVLink": 3.4e-6, "PCIe": 5.7e-6, "network": 14.0e-6}
_ROUNDS = {"all_reduce": 2}


class Sent(NamedTuple):
    """All collectives of one kind of an optimizer step: bytes that one rank sends, and the seconds of the link."""

    collective: str
    link: str
    ranks: int
    calls: int
    bytes: int
    seconds: float


def sent(messages: Iterable[Message], gpu: Gpu, layout: Layout, *, gpus_per_node: int) -> list[Sent] | None:
    """The messages on this card's links; None where a link's bandwidth is unknown."""
    found = []
    for message in messages:
        if message.ranks < 2 or not message.bytes:
            continue
        link = _link(message, gpu, layout, gpus_per_node)
        if link is None:
            return None
        name, bandwidth = link
        rounds = _ROUNDS.get(message.collective, 1)
        size = rounds * message.bytes * (message.ranks - 1) // message.ranks
        hops = rounds * (message.ranks - 1) * HOP_SECONDS[name]
        seconds = size / (OF_LINK * bandwidth) + message.calls * (START_SECONDS + hops)
        found.append(Sent(message.collective, name, message.ranks, message.calls, size, seconds))
    return _together(found)


def _together(each: Iterable[Sent]) -> list[Sent]:
    """One for each kind of collective among as many ranks over one kind of link."""
    kinds: dict[tuple[str, str, int], Sent] = {}
    for one in each:
        key = one.collective, one.link, one.ranks
        old = kinds.get(key)
        kinds[key] = (
            one
            if old is None
            else old._replace(
                calls=old.calls + one.calls, bytes=old.bytes + one.bytes, seconds=old.seconds + one.seconds
            )
        )
    return [*kinds.values()]


def _link(message: Message, gpu: Gpu, layout: Layout, gpus_per_node: int) -> tuple[str, float] | None:
    """The slowest link of the ring and its bandwidth: rings of all GPUs of a node share its network cards."""
    inner = layout.world // layout.dp
    span = message.ranks * inner * (layout.shards if message.across else 1)
    own = gpu.link.bytes_per_second
    name = "NVLink" if own is not None else "PCIe"
    within = own if own is not None else gpu.pcie.bytes_per_second if gpu.pcie is not None else None
    if span <= gpus_per_node:
        return (name, within) if within is not None else None
    network = gpu.node.network_bytes_per_second
    if network is None:
        return None
    sharing = 1 if message.across else max(1, gpus_per_node // inner)
    return "network", min(network * sharing, within or network * sharing)


def exposed_seconds(found: Iterable[Sent], *, computing: float, overlaps: float) -> float:
    """What of the collectives is not hidden behind `overlaps` of the computing time; the first at least is not."""
    each = list(found)
    total = sum(one.seconds for one in each)
    first = sum(one.seconds / one.calls for one in each)
    return max(total - overlaps * computing, first)
