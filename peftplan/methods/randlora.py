"""RandLoRA: random frozen low-rank products, scaled by trained diagonals, are summed (Albert 2025, arXiv:2502.00987).

Trains: n (r + min(in, out)) per adapted linear layer, n = min(in, out) / r rounded up; plus `bias` and copies of
`modules_to_save`.
Keeps for backward: the scaled basis of the smaller side, as large as a weight of r n x min(in, out); the layer's input
(where in <= out) or its projection (where out < in), in the adapter's dtype.
Not modelled: embeddings.
Mirrors peft/tuners/randlora/layer.py Linear.forward and UniqueBaseGrad, bnb.py Linear4bit and Linear8bitLt.forward, and
model.py, peft 0.21.2. One pair of buffers serves the whole model: (r, 1, smaller side) and (larger side, n, r) of the
widest adapted layers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.errors import Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Grad, Need, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, builder, check_rank, check_share, result_of, returned, widest
from peftplan.methods._linears import COMMON, ended, packed
from peftplan.methods.base import Host
from peftplan.units import ceil_div

HARMLESS = COMMON | {
    "projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_alpha", "init_weights",
}  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class ScaledBasis(Op):
    """peft's autograd function: ins = (lambda (r, n), A (r, 1, side), gamma (n, side)); their product keeps them.

    Either gradient is a batched product with an elementwise one before it.
    """

    def grad_flops(self, need: Need) -> int:  # noqa: ARG002
        return 4 * self.out.numel

    def saved(self, need: Need) -> tuple[Tensor, ...]:  # noqa: ARG002
        return self.ins

    def scratch_bytes(self) -> int:
        return self.out.nbytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        first, _, second = self.ins
        return tuple(Grad(t, t.logical_bytes, self.out.nbytes) for t in (first, second) if t.name in need)


@final
@dataclass(frozen=True)
class Randlora(OnLinears):
    """PEFT's RandLoraConfig."""

    r: int = 32
    randlora_dropout: float = 0.0
    bias: Literal["none", "all", "randlora_only"] = "none"
    title: ClassVar[str] = "RandLoRA"
    returns_input: ClassVar[bool] = True
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_rank(self.r)
        check_share("randlora_dropout", self.randlora_dropout)

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        small, large = sorted(widest(chosen))
        return self._pair(small, large, ceil_div(small, self.r), host)

    def _pair(self, small: int, large: int, count: int, host: Host) -> tuple[Tensor, Tensor]:
        """A and B, or the parts of them that a layer reads."""
        a = Tensor("@randlora_A", (self.r, 1, small), host.new_dtype, BUFFER)
        return a, Tensor("@randlora_B", (large, count * self.r), host.new_dtype, BUFFER)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        with b.marked(module.site, "down"):
            result = result_of(b, base, module)
            basis, other = self._bases(b, module, host)
            x = b.cast(module.x, basis.dtype, label="randlora_x")
            given = b.dropout(x, self.randlora_dropout)
            expands = module.in_features <= module.out_features
            first, second = (basis, other) if expands else (other, basis)
            down = b.linear(given, first.view(first.shape[0], module.in_features), label="randlora_down")
        with b.marked(module.site, "up"):
            product = b.linear(down, second.view(module.out_features, down.shape[-1]), label="randlora_up")
            change = b.scale(product)
        with b.marked(module.site, "extra"):
            out = returned(b, b.add(result, change, label="sum"), x, module, host)
            b.hold(basis, other, x, module.x, *((given, product) if packed(module) is not None else ()))
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))

    def _bases(self, b: Builder, module: Module, host: Host) -> tuple[Tensor, Tensor]:
        """get_scaled_bases: (n r, smaller side), which trains, and (n r, larger side)."""
        small, large = sorted(module.weight.shape)
        count = ceil_div(small, self.r)
        dtype = host.new_dtype
        scale = b.weight("randlora_lambda", self.r, count, dtype=dtype, kind=ADAPTER)
        gain = b.weight("randlora_gamma", count, small, dtype=dtype, kind=ADAPTER)
        a, other = self._pair(small, large, count, host)
        if dtype.is_half and b.numerics.backend == "cpu":
            raise Unsupported("RandLoRA in half precision on a CPU is not modelled; use --adapter-dtype fp32")
        name = b.name("scaled_basis")
        out = Tensor(name, (count * self.r, small), a.dtype)
        b.ops.append(ScaledBasis(name=name, ins=(scale, a, gain), out=out, site=module.site, part="down"))
        return out, other._replace(shape=(count * self.r, large))


METHOD = Randlora
EXAMPLES = (Randlora(r=8), Randlora(r=5, target_modules="all-linear", randlora_dropout=0.1))
UNVERIFIED: dict[str, str] = {}
