"""Lily: LoRA whose B is mixed, by a router, from a few that all layers share (Zhong 2024, arXiv:2407.09946).

Trains: r in for every stride_A adapted neighbours and r num_B per adapted linear layer, and num_B r out once for each
kind of layer; plus copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype, r + num_B numbers a token, and the mixed B.
Not modelled: embeddings.
Mirrors peft/tuners/lily/layer.py Linear.forward and model.py _post_injection_hook, peft 0.21.2.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, fields
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import OnLinears, builder, check_rank, in_order
from peftplan.methods._linears import COMMON, Plan, ended
from peftplan.methods.base import Host
from peftplan.methods.targets import ALL_LINEAR, Targets

HARMLESS = COMMON | {"scaling", "init_weights"}


WHOLE_NAMES = 20
"""From this many on PEFT shortens a list of module names (MIN_TARGET_MODULES_FOR_OPTIMIZATION)."""


@dataclass(frozen=True)
class Lily(OnLinears):
    """PEFT's LilyConfig."""

    r: int = 32
    stride_A: int = 1  # noqa: N815 (PEFT's name)
    num_B: int = 2  # noqa: N815 (PEFT's name)
    title: ClassVar[str] = "Lily"
    shares: ClassVar[bool] = True

    def check(self) -> None:
        check_rank(self.r)
        if self.num_B < 1:
            raise RequestError(f"method.num_B={self.num_B}: must be at least 1")
        if self.stride_A < 1:
            raise RequestError(f"method.stride_A={self.stride_A}: must be at least 1")

    def apply(self, graph: Graph, host: Host) -> Graph:
        """PEFT makes all-linear a list of whole names, no two of one kind, and shortens it where it is long."""
        if self.shares and self._on_all and sum(map(len, self.planned(graph, host).values())) < WHOLE_NAMES:
            return _Alone(**{f.name: getattr(self, f.name) for f in fields(self)}).apply(graph, host)
        return super().apply(graph, host)

    @property
    def _on_all(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def _kind(self, module: Module) -> str:
        """_post_injection_hook: modules of one name, or of all that a pattern matches, that are of one shape."""
        wanted = self.target_modules
        if isinstance(wanted, str) and not self._on_all and not re.fullmatch(r"\w+", wanted):
            return f"{module.out_features}x{module.in_features}"
        return module.path

    def plan(self, graph: Graph, choice: Targets) -> Plan[int]:
        """The number of the A that each module has, of its kind; 0 where it has one of its own."""
        planned = super().plan(graph, choice)
        if self.stride_A == 1 or not self.shares:
            return planned
        met: Counter[str] = Counter()
        numbered: dict[int | str, dict[str, int]] = {key: {} for key in planned}
        for key, module in in_order(graph, planned):
            kind = self._kind(module)
            numbered[key][module.path] = met[kind] // self.stride_A + 1
            met[kind] += 1
        return numbered

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        b, base = builder(module, host)
        dtype, out, kind = host.new_dtype, module.out_features, self._kind(module)
        a = b.weight("lily_A.weight", self.r, module.in_features, dtype=dtype, kind=ADAPTER)
        a = a._replace(name=f"@lily_A.{kind}.{size}.weight") if size else a
        router = b.weight("lily_router.weight", self.num_B, self.r, dtype=dtype, kind=ADAPTER)
        shared = b.weight("lily_B.weight", self.num_B * self.r, out, dtype=dtype, kind=ADAPTER)
        if self.shares:
            shared = shared._replace(name=f"@lily_B.{kind}.weight")
        with b.marked(module.site, "down"):
            x = b.cast(module.x, dtype, label="lily_x")
            hidden = b.linear(x, a, label="lily_A")
        with b.marked(module.site, "up"):
            mixed, held = self._mixed(b, b.linear(hidden, router, label="router"), shared)
            tokens = hidden.numel // self.r
            flat = hidden.view(tokens, self.r)
            change = b.matmul(flat, mixed.view(self.r, out), *base.shape, inner=self.r, label="delta")
        with b.marked(module.site, "extra"):
            given = b.cast(b.scale(change, label="scaled"), base.dtype, label="delta_cast")
            result = b.add(base, given, label="sum")
            b.hold(hidden, *held, mixed, change, x, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, result, module, name=self.title))

    def _mixed(self, b: Builder, logits: Tensor, shared: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mean of the router's probabilities times the shared matrices, and the locals before it."""
        chances = b.softmax(logits, logits.dtype)
        mean = Tensor("", (self.num_B,), chances.dtype)
        mean = b.formula("mean", mean, chances, grads=(Grad(chances, chances.logical_bytes),))
        width = shared.numel // self.num_B
        mixed = b.matmul(mean.view(1, self.num_B), shared, 1, width, inner=self.num_B, label="mixed")
        return mixed, (logits, chances, mean)


@final
@dataclass(frozen=True)
class _Alone(Lily):
    """Each module has its own A and B."""

    shares: ClassVar[bool] = False


METHOD = Lily
EXAMPLES = (Lily(r=8), Lily(r=3, num_B=4, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
