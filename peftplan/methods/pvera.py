"""PVeRA: VeRA whose inner activations are drawn from a learned normal distribution (arXiv:2512.07703).

Trains: 2 r + out per adapted linear layer; plus `bias` and copies of `modules_to_save`.
Keeps for backward: A x (2 r a token), the spread and the noise (r each), and B's output, in the adapter's dtype, and a
mask where there is dropout; not the input.
Not modelled: embeddings.
Mirrors peft/tuners/pvera/layer.py Linear.forward and _reparametrize, bnb.py Linear4bit and Linear8bitLt.forward, and
model.py, peft 0.21.2. A (2 r, widest in) and B (widest out, r) are one pair of buffers for the model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Grad, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, builder, check_rank, check_share, result_of, returned, widest
from peftplan.methods._linears import COMMON, ended, packed
from peftplan.methods.base import Host

HARMLESS = COMMON | {
    "projection_prng_key", "save_projection", "d_initial", "init_weights", "sample_at_inference", "generator_seed",
}  # fmt: skip


@final
@dataclass(frozen=True)
class Pvera(OnLinears):
    """PEFT's PveraConfig."""

    r: int = 256
    pvera_dropout: float = 0.0
    bias: Literal["none", "all", "pvera_only"] = "none"
    title: ClassVar[str] = "PVeRA"
    returns_input: ClassVar[bool] = True
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_rank(self.r)
        check_share("pvera_dropout", self.pvera_dropout)

    def _pair(self, wide: int, out: int, host: Host) -> tuple[Tensor, Tensor]:
        a = Tensor("@pvera_A", (2 * self.r, wide), host.new_dtype, BUFFER)
        return a, Tensor("@pvera_B", (out, self.r), host.new_dtype, BUFFER)

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        return self._pair(*widest(chosen), host)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        dtype = host.new_dtype
        a, up = self._pair(module.in_features, module.out_features, host)
        scale_b = b.weight("pvera_lambda_b", module.out_features, dtype=dtype, kind=ADAPTER)
        scale_d = b.weight("pvera_lambda_d", 2 * self.r, dtype=dtype, kind=ADAPTER)
        with b.marked(module.site, "down"):
            result = result_of(b, base, module)
            b.hold(scale_b, scale_d)  # in the order they are registered in
            x = b.cast(module.x, dtype, label="pvera_x")
            given = b.dropout(x, self.pvera_dropout)
            down = b.mul(scale_d, b.linear(given, a, label="pvera_A"), label="d_Ax")
            drawn = self._drawn(b, down)
        with b.marked(module.site, "up"):
            change = b.mul(scale_b, b.linear(drawn, up, label="pvera_B"), label="b_Bz")
        with b.marked(module.site, "extra"):
            out = returned(b, b.add(result, change, label="sum"), x, module, host)
            b.hold(down, x, module.x, *((given, change) if packed(module) is not None else ()))
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))

    def _drawn(self, b: Builder, down: Tensor) -> Tensor:
        """mu + eps * exp(logvar / 2)."""
        shape = (*down.shape[:-1], self.r)
        mu, logvar = (b.slice(down, *shape, label=label) for label in ("mu", "logvar"))
        half = b.scale(logvar, label="half")
        spread = Tensor("", shape, half.dtype)
        spread = b.formula("std", spread, half, keeps_out=True, grads=(Grad(half, half.logical_bytes),))
        noise = b.plain("eps", *shape, dtype=down.dtype)
        out = b.add(mu, b.mul(noise, spread, label="noise"), label="drawn")
        b.hold(spread, noise)
        return out


METHOD = Pvera
EXAMPLES = (Pvera(r=8), Pvera(r=3, target_modules="all-linear", pvera_dropout=0.1))
UNVERIFIED: dict[str, str] = {}
