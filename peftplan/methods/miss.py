"""MiSS: the input, summed in pieces of r, times one small matrix (Kang 2025, arXiv:2409.15371; was Bone).

Trains: r x out per adapted linear layer (also with init_weights=bat), r x mini_r with init_weights=mini; plus `bias`,
copies of `modules_to_save`.
Keeps for backward: the sums, r a token; a mask of the input where there is dropout. With bat the input and two weights
in the adapter's dtype.
Not modelled: embeddings.
Mirrors peft/tuners/miss/layer.py MissLinear.forward, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import OnLinears, bias_of, builder, check_rank, check_share, result_of
from peftplan.methods._linears import BACKENDS, COMMON, ended, unpacked
from peftplan.methods.base import Host

VARIANTS: dict[str, dict[str, Any]] = {"bone": {}}
"""What PEFT called it until 0.18."""
HARMLESS = COMMON


@final
@dataclass(frozen=True)
class Miss(OnLinears):
    """PEFT's MissConfig."""

    r: int = 64
    mini_r: int = 1
    init_weights: bool | Literal["bat", "mini"] = True
    miss_dropout: float = 0.0
    bias: Literal["none", "all", "MiSS_only"] = "none"
    title: ClassVar[str] = "MiSS"
    layers: ClassVar[frozenset[str]] = BACKENDS
    returns_input: ClassVar[bool] = True

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_rank(self.r)
        check_share("miss_dropout", self.miss_dropout)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        if self.r > module.in_features:
            raise RequestError(f"--rank {self.r} is larger than the input of {module.path} ({module.in_features})")
        b, base = builder(module, host)
        if self.init_weights == "bat":
            return self._bat(b, module, host)
        with b.marked(module.site, "down"):
            result = result_of(b, base, module)
            block = self._block(b, module, host)
            pieces = -(-module.in_features // self.r)
            x = module.x
            if pieces * self.r != module.in_features:
                x = b.copy(x, *x.shape[:-1], pieces * self.r, label="padded")
            x = b.cast(x, host.new_dtype, label="miss_x")
            given = b.dropout(x, self.miss_dropout)
            sums = b.copy(given, *x.shape[:-1], self.r, label="sums", grad_copied=pieces > 1)
        with b.marked(module.site, "up"):
            delta = b.linear(sums, block.view(module.out_features, self.r), label="miss")
        with b.marked(module.site, "extra"):
            out = b.cast(b.add(result, delta, label="sum"), module.x.dtype, label="out")
            b.hold(x, block, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))

    def _bat(self, b: Builder, module: Module, host: Host) -> tuple[Op, ...]:
        """get_delta_weight: every r x r piece of the weight times its row's block, plus the block; the base layer is
        not called."""
        out, wide, r = module.out_features, module.in_features, self.r
        if out % r or wide % r:
            raise RequestError(f"--rank {r} does not divide both sides of {module.path} ({out}x{wide})")
        if host.new_dtype.is_half and b.numerics.backend == "cpu":
            raise Unsupported("MiSS bat in half precision on a CPU is not modelled; use --adapter-dtype fp32")
        pieces = (wide // r * (out // r), r, r)
        with b.marked(module.site, "down"):
            block = b.alias(b.weight("miss_block", out // r, r, r, dtype=host.new_dtype, kind=ADAPTER))
            whole = unpacked(b, module)
            whole = b.plain("cloned", out, wide, dtype=whole.dtype, ins=(whole,))
            given = b.cast(whole, block.dtype, label="weight_cast")
            stacked = b.plain("stacked", *pieces, dtype=given.dtype, ins=(given,))
            spread = b.copy(block, *pieces, label="spread", grad_copied=True)
            product = b.matmul(stacked, spread, *pieces, inner=r, label="turned")
            shifted = b.add(product, block, label="shifted")
            delta = b.copy(shifted, out, wide, label="delta", grad_copied=True)
            b.hold(given, shifted)
            weight = b.add(whole, delta, label="weight")
            x = b.cast(module.x, weight.dtype, label="miss_x")
            bias = bias_of(module)
            bias = None if bias is None else b.cast(bias, weight.dtype, label="bias_cast")
        with b.marked(module.site, "extra"):
            result = b.linear(x, weight, bias, label="miss")
            result = b.cast(result, module.x.dtype, label="out")
            b.hold(delta, weight, x, module.x, *(() if bias is None else (bias,)))
        return ended(b, result, module, name=self.title)

    def _block(self, b: Builder, module: Module, host: Host) -> Tensor:
        if self.init_weights != "mini":
            return b.weight("miss_block", self.r, module.out_features, dtype=host.new_dtype, kind=ADAPTER)
        if module.out_features % self.mini_r:
            raise RequestError(f"method.mini_r={self.mini_r} does not divide the output of {module.path}")
        small = b.weight("miss_block", self.r, self.mini_r, dtype=host.new_dtype, kind=ADAPTER)
        repeated = module.out_features > self.mini_r
        return b.copy(small, self.r, module.out_features, label="miss_repeat", grad_copied=repeated)


METHOD = Miss
EXAMPLES = (Miss(r=8), Miss(r=5, init_weights="mini", target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
