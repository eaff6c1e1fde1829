"""Replacing linear layers by packed stand-ins, shared by the formats that pack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, rewrite

PACKED_SITES = frozenset(
    {"q", "k", "v", "o", "qkv", "q_a", "q_b", "kv_a", "kv_b", "gate", "up", "down", "gate_up", "shared_gate"}
)
"""transformers packs modules of class nn.Linear, so no router and no stacked experts; it keeps the output head and tied
weights out (quantizers/base.py, get_keys_to_not_convert)."""


def pack(graph: Graph, stand_in: Callable[[Module], tuple[Op, ...]]) -> Graph:
    """The graph with `stand_in(module)` for every linear layer inside the decoder layers."""

    def choose(module: Module) -> Callable[[Module], tuple[Op, ...]] | None:
        return stand_in if module.site in PACKED_SITES else None

    return replace(graph, regions=tuple(rewrite(region, choose) for region in graph.regions))


def biases(module: Module) -> tuple[Tensor, ...]:
    """The module's bias, if it has one."""
    return tuple(t for op in module.ops for t in op.ins if t.is_param and len(t.shape) == 1)
