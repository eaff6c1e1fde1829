"""PEFT's `layer_replication`: layers stacked anew, some of them several times, over weights that they share.

Mirrors peft/tuners/tuners_utils.py replicate_layers, peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from peftplan.arch.core import Arch
from peftplan.errors import RequestError, Unsupported
from peftplan.graph.core import Graph, Region
from peftplan.graph.ops import PackedLinear, Unpack

Spans = Sequence[tuple[int, int]]
"""From (including) and to (excluding) which layer, in the order they are stacked."""
BY_NUMBER = ("qwen2", "qwen3", "smollm3")
"""Families whose forward looks in the config's `layer_types` for each layer's kind (modeling_qwen2.py,
modeling_qwen3.py, modeling_smollm3.py, transformers 5.23)."""


class _Place(NamedTuple):
    """One layer of the new stack: a layer of the old one (as a run of one), and whether an earlier place has it."""

    layer: Region
    again: bool


def check_stacking(graph: Graph, *, bias: str, adapters: int) -> None:
    """Raises RequestError for what goes not with layers stacked anew."""
    if any(isinstance(op, (PackedLinear, Unpack)) for r in graph.regions for op in r.ops):
        raise Unsupported(
            "method.layer_replication on packed weights, whose constants PEFT copies, is not modelled; use an "
            "unquantized --format"
        )
    if bias != "none":
        raise Unsupported("method.layer_replication with trained biases is not modelled; set bias to none")
    if adapters > 1:
        raise RequestError("method.layer_replication: PEFT stacks the layers anew for every adapter; set adapters to 1")


def replicate(graph: Graph, spans: Spans, arch: Arch) -> Graph:
    """The graph with its layers stacked as `spans` say. Raises RequestError where they name layers that are not, or
    more than the family's forward can tell apart."""
    old = [replace(r, count=1, first_index=r.first_index) for r in graph.regions for _ in range(r.count)
           if r.first_index is not None]  # fmt: skip
    order = list(_order(spans, len(old)))
    if arch.family in BY_NUMBER and len(order) > len(old):
        raise RequestError(
            f"method.layer_replication: transformers' {arch.family} looks kinds of layers up by number, and has "
            f"{len(old)}; stack no more than that"
        )
    places = [_Place(old[i], again=i in order[:at]) for at, i in enumerate(order)]
    stacked: list[Region] = []
    for (layer, again), run in groupby(places, lambda p: (p.layer, p.again)):
        count = len(list(run))
        first = sum(r.count for r in stacked)
        stacked.append(replace(layer, count=count, first_index=first, borrows=again))
    at = next(i for i, r in enumerate(graph.regions) if r.first_index is not None)
    around = [r for r in graph.regions if r.first_index is None]
    return replace(graph, regions=(*around[:at], *stacked, *around[at:]))


def _order(spans: Spans, layers: int) -> Iterator[int]:
    """The old layers' indices in the new order."""
    for start, end in spans:
        if not 0 <= start < end <= layers:
            raise RequestError(
                f"method.layer_replication: [{start}, {end}) is no range of the {layers} layers; use 0 to {layers}"
            )
        yield from range(start, end)
