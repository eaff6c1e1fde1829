"""VeRA: y = Wx + b * B (d * (A x)), A and B random, frozen and shared, b and d train (Kopiczko 2023, arXiv:2310.11454,
equation 2).

Trains: r + out per adapted linear layer; plus `bias` and copies of `modules_to_save`.
Keeps for backward: A x and B (d A x), in the adapter's dtype, and a mask where there is dropout; not the input.
Not modelled: the head under autocast over an fp32 base; embeddings.
Mirrors peft/tuners/vera/layer.py Linear.forward and model.py _init_vera_A_vera_B, peft 0.21.2. A (r, widest in) and
B (widest out, r) are one pair of buffers for the model, in the adapter's dtype.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.graph.core import ADAPTER, BUFFER, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, builder, check_rank, check_share, result_of, widest
from peftplan.methods._linears import BACKENDS, COMMON, ended
from peftplan.methods.base import Host

HARMLESS = COMMON | {"projection_prng_key", "save_projection", "d_initial", "init_weights"}


@final
@dataclass(frozen=True)
class Vera(OnLinears):
    """PEFT's VeraConfig."""

    r: int = 256
    vera_dropout: float = 0.0
    bias: Literal["none", "all", "vera_only"] = "none"
    title: ClassVar[str] = "VeRA"
    layers: ClassVar[frozenset[str]] = BACKENDS
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    returns_input: ClassVar[bool] = True

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_rank(self.r)
        check_share("vera_dropout", self.vera_dropout)

    def _pair(self, wide: int, out: int, host: Host) -> tuple[Tensor, Tensor]:
        a = Tensor("@vera_A", (self.r, wide), host.new_dtype, BUFFER)
        return a, Tensor("@vera_B", (out, self.r), host.new_dtype, BUFFER)

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        return self._pair(*widest(chosen), host)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        ops = writing(module.ops, module.out, base)
        a, up = self._pair(module.in_features, module.out_features, host)
        scale_d = b.weight("vera_lambda_d", self.r, dtype=host.new_dtype, kind=ADAPTER)
        scale_b = b.weight("vera_lambda_b", module.out_features, dtype=host.new_dtype, kind=ADAPTER)
        with b.marked(module.site, "down"):
            result = result_of(b, base, module)
            x = b.cast(module.x, host.new_dtype, label="vera_x")
            down = b.mul(scale_d, b.linear(b.dropout(x, self.vera_dropout), a, label="vera_A"), label="d_Ax")
        with b.marked(module.site, "up"):
            delta = b.mul(scale_b, b.linear(down, up, label="vera_B"), label="b_BdAx")
        with b.marked(module.site, "extra"):
            out = b.cast(
                b.cast(b.add(result, delta, label="sum"), base.dtype, label="out"), module.x.dtype, label="out_x"
            )
            b.hold(x, module.x)
        return (*ops, *ended(b, out, module, name=self.title))


METHOD = Vera
EXAMPLES = (Vera(r=8), Vera(r=3, target_modules="all-linear", vera_dropout=0.1))
UNVERIFIED: dict[str, str] = {}
