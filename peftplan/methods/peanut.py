"""PEANuT: the weight changes by a small network of the weight itself (Zhong 2024, arXiv:2410.01870).

Trains: 2 r out + 2 depth r^2 per adapted linear layer; plus copies of `modules_to_save`.
Keeps for backward: the layer's input, its weight and the whole change of it, all in the adapter's dtype, and r numbers
for every input a few times.
Not modelled: activations but relu, tanh, sigmoid, silu and gelu; embeddings, 4-bit bases (PEFT fails on them).
Mirrors peft/tuners/peanut/layer.py Linear.forward and _compute_delta_weight, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._activations import active, check_activation
from peftplan.methods._branches import OnLinears, builder, check_rank
from peftplan.methods._linears import COMMON, ended, packed
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"scaling", "init_weights"}


@final
@dataclass(frozen=True)
class Peanut(OnLinears):
    """PEFT's PeanutConfig."""

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    title: ClassVar[str] = "PEANuT"
    no_4bit: ClassVar[str] = "PEFT runs its network over the weight, which is not in the shape of one"

    def check(self) -> None:
        check_rank(self.r)
        if self.depth < 0:
            raise RequestError(f"method.depth={self.depth}: must be at least 0")
        check_activation("act_fn", self.act_fn)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        with b.marked(module.site, "down"):
            delta = self._delta(b, module, host)
            x = b.cast(module.x, delta.dtype, label="peanut_x")
            inner = module.in_features
            flat = x.view(x.numel // inner, inner)
            change = b.matmul(flat, delta, *base.shape, inner=inner, label="delta_out")
        with b.marked(module.site, "extra"):
            out = b.add(base, b.cast(change, base.dtype, label="delta_cast"), label="sum")
            b.hold(delta, x, change, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))

    def _delta(self, b: Builder, module: Module, host: Host) -> Tensor:
        """(in, out): encoders with their results kept aside, and decoders that they are added to."""
        r, out, dtype = self.r, module.out_features, host.new_dtype
        shapes = {"A": (r, out), "B": (out, r)}
        for i in range(self.depth):
            shapes |= {f"encoders.{i}": (r, r), f"decoders.{i}": (r, r)}
        weights = {n: b.weight(f"peanut_{n}.weight", *s, dtype=dtype, kind=ADAPTER) for n, s in shapes.items()}
        base = self._weight(b, module, dtype).view(module.in_features, out)
        h = active(b, b.linear(base, weights["A"], label="peanut_A"), self.act_fn)
        aside = []
        for i in range(self.depth):
            aside.append(h)
            h = active(b, b.linear(h, weights[f"encoders.{i}"], label="encoder"), self.act_fn)
        for i in range(self.depth):
            h = active(b, b.linear(h, weights[f"decoders.{i}"], label="decoder"), self.act_fn)
            h = b.add(h, aside[-1 - i], label="residual")
        delta = b.scale(b.linear(h, weights["B"], label="peanut_B"), label="delta")
        b.hold(base, *aside)
        return delta

    def _weight(self, b: Builder, module: Module, dtype: DType) -> Tensor:
        """base_layer.weight.to(dtype): of a packed one the integers, without their scales."""
        if packed(module) is None:
            return b.cast(module.weight, dtype, label="base_weight")
        return b.plain("base_weight", *module.weight.shape, dtype=dtype, ins=(module.weight,))


METHOD = Peanut
EXAMPLES = (Peanut(r=8), Peanut(r=3, depth=2, act_fn="silu", target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
