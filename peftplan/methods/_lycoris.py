"""What LoHa and LoKr share: a change of the weight, made anew in each forward, as a second linear layer.

Mirrors peft/tuners/lycoris_utils.py and the forward of peft/tuners/loha/layer.py and lokr/layer.py, peft 0.21.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._linears import COMMON, adapt, ended, packed, plan
from peftplan.methods._saved import save_modules
from peftplan.methods.base import Host
from peftplan.methods.targets import Targets

HARMLESS = COMMON | {"alpha", "alpha_pattern", "init_weights", "use_effective_conv2d"}
Delta = Callable[[Builder, Module, int], Tensor]
"""Writes the change of a module's weight for a rank: (out, in)."""


def check(rank: int, **dropouts: float) -> None:
    if rank < 1:
        raise RequestError(f"--rank {rank}: the rank must be at least 1")
    for name, value in dropouts.items():
        if value:
            raise Unsupported(f"method.{name}={value} is not modelled yet; leave it out")


def rank_of(path: str, rank: int, patterns: Mapping[str, int]) -> int:
    """peft.utils.other.get_pattern_key: the first pattern that matches the end of the module's name."""
    return next((r for pattern, r in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), rank)


def attach(
    graph: Graph, host: Host, choice: Targets, rank: Callable[[str], int], delta: Delta, *, name: str,
    saved: tuple[str, ...] | None,
) -> Graph:  # fmt: skip
    """The graph with `base(x) + linear(x, delta)` in place of each chosen layer."""

    def branch(module: Module, r: int) -> tuple[Op, ...]:
        if packed(module) is not None:
            raise Unsupported(f"PEFT has no {name} on packed weights; use an unquantized --format")
        b = Builder(host.numerics, f"{'@' * module.weight.name.startswith('@')}{module.path}.")
        base = module.out._replace(name=f"{module.out.name}.base")
        with b.marked(module.site, "down"):
            weight = delta(b, module, r)
            x = b.cast(module.x, weight.dtype, label="adapter_x")
            change = b.linear(x, weight, label="delta_out")
            b.hold(x, weight)
        with b.marked(module.site, "extra"):
            out = b.cast(b.add(base, change, label="sum"), module.x.dtype, label="out")
            b.hold(module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=name))

    return save_modules(adapt(graph, plan(graph, choice, rank), branch, name=name), saved)
