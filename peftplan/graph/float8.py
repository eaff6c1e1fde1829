"""Linear layers that compute in float8 while their weights stay as they are: torchao's float8 training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op
from peftplan.graph.edit import Module, rewrite, writing
from peftplan.graph.ops import Float8Linear, Linear

MULTIPLE = 16
"""Both sides of a weight must be one (torch._scaled_mm)."""


def in_float8(graph: Graph, numerics: Numerics) -> Graph:
    """The graph with every linear layer but the head whose weight's sides are multiples of 16 in float8 (torchao 0.18,
    float8/float8_linear_utils.py, convert_to_float8_training with such a filter)."""

    def choose(module: Module) -> Callable[[Module], tuple[Op, ...]] | None:
        linear = module.site != "head" and any(type(op) is Linear for op in module.ops)
        fits = not any(side % MULTIPLE for side in module.weight.shape)
        return (lambda given: _converted(given, numerics)) if linear and fits else None

    return replace(graph, regions=tuple(rewrite(region, choose) for region in graph.regions))


def _converted(module: Module, numerics: Numerics) -> tuple[Op, ...]:
    """Float8Linear.forward: the product, then the bias."""
    b = Builder(numerics, f"{module.path}.")
    name = b.name("float8")
    product = module.out._replace(name=name)
    b.ops.append(Float8Linear(name=name, ins=(module.x, module.weight), out=product, site=module.site))
    bias = next((t for op in module.ops for t in op.ins if t.is_param and len(t.shape) == 1), None)
    if bias is not None:
        with b.marked(module.site):
            b.add(product, bias, label="biased")
    return writing(b.ops, b.ops[-1].out, module.out)
