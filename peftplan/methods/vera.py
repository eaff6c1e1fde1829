"""VeRA: y = Wx + b * B (d * (A x)), A and B random, frozen and shared, b and d train (Kopiczko 2023, arXiv:2310.11454,
equation 2).

Trains: r + out per adapted linear layer; plus `bias` and copies of `modules_to_save`.
Keeps for backward: A x and B (d A x), in the adapter's dtype, and a mask where there is dropout; not the input.
Not modelled: outputs whose dtype the adapter changes (autocast over an fp32 base); embeddings.
Mirrors peft/tuners/vera/layer.py Linear.forward and model.py _init_vera_A_vera_B, peft 0.21.2. A (r, widest in) and
B (widest out, r) are one pair of buffers for the model, in the adapter's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Graph, Op, Tensor
from peftplan.graph.edit import Module, modules, writing
from peftplan.methods._linears import COMMON, Plan, adapt, ended, packed, plan, train_biases
from peftplan.methods._saved import save_modules
from peftplan.methods.base import Host, Method
from peftplan.methods.targets import DEFAULTS, Names, targets

HARMLESS = COMMON | {"projection_prng_key", "save_projection", "d_initial", "init_weights"}


@final
@dataclass(frozen=True)
class Vera(Method):
    """PEFT's VeraConfig."""

    r: int = 256
    target_modules: Names = None
    exclude_modules: Names = None
    vera_dropout: float = 0.0
    bias: Literal["none", "all", "vera_only"] = "none"
    modules_to_save: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | int | None = None

    def default_targets(self, family: str) -> Names:
        return DEFAULTS.get(family)

    def apply(self, graph: Graph, host: Host) -> Graph:
        if self.r < 1:
            raise RequestError(f"--rank {self.r}: the rank must be at least 1")
        if not 0 <= self.vera_dropout < 1:
            raise RequestError(f"method.vera_dropout={self.vera_dropout}: must be at least 0 and below 1")
        choice = targets(
            host.arch.family, self.target_modules, excluded=self.exclude_modules, layers=self.layers_to_transform
        )
        planned: Plan[None] = plan(graph, choice, lambda path: None)  # noqa: ARG005
        wide, out = _widest(graph, planned)
        a = Tensor("@vera_A", (self.r, wide), host.new_dtype, BUFFER)
        up = Tensor("@vera_B", (out, self.r), host.new_dtype, BUFFER)

        def branch(module: Module, _: None) -> tuple[Op, ...]:
            mine = a._replace(shape=(self.r, module.in_features)), up._replace(shape=(module.out_features, self.r))
            return self._branch(module, host, *mine)

        adapted = train_biases(adapt(graph, planned, branch, name="VeRA"), planned, self.bias)
        return save_modules(replace(adapted, buffers=(*adapted.buffers, a, up)), self.modules_to_save)

    def _branch(self, module: Module, host: Host, a: Tensor, up: Tensor) -> tuple[Op, ...]:
        b = Builder(host.numerics, f"{module.path}.")
        base = module.out._replace(name=f"{module.out.name}.base")
        ops, kernel = writing(module.ops, module.out, base), packed(module)
        scale_d = b.weight("vera_lambda_d", self.r, dtype=host.new_dtype, kind=ADAPTER)
        scale_b = b.weight("vera_lambda_b", module.out_features, dtype=host.new_dtype, kind=ADAPTER)
        with b.marked(module.site, "down"):
            result = b.copy(base, label="clone") if kernel is not None and kernel.adapters_clone else base
            x = b.cast(module.x, host.new_dtype, label="vera_x")
            down = b.mul(scale_d, b.linear(b.dropout(x, self.vera_dropout), a, label="vera_A"), label="d_Ax")
        with b.marked(module.site, "up"):
            delta = b.mul(scale_b, b.linear(down, up, label="vera_B"), label="b_BdAx")
        with b.marked(module.site, "extra"):
            out = b.cast(
                b.cast(b.add(result, delta, label="sum"), base.dtype, label="out"), module.x.dtype, label="out_x"
            )
            b.hold(x, module.x)
        return (*ops, *ended(b, out, module, name="VeRA"))


def _widest(graph: Graph, planned: Plan[None]) -> tuple[int, int]:
    """The largest input and output of the adapted layers."""
    chosen = [
        m
        for r in graph.regions
        for _, _, m in modules(r)
        for index in ([r.name] if r.first_index is None else range(r.first_index, r.first_index + r.count))
        if m.path in planned[index]
    ]
    return max(m.in_features for m in chosen), max(m.out_features for m in chosen)


METHOD = Vera
EXAMPLES = (Vera(r=8), Vera(r=3, target_modules="all-linear", vera_dropout=0.1))
UNVERIFIED: dict[str, str] = {}
