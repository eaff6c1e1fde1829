"""MiSS: the input, summed in pieces of r, times one small matrix (Kang 2025, arXiv:2409.15371; was Bone).

Trains: r x out per adapted linear layer, r x mini_r with init_weights=mini; plus `bias`, copies of `modules_to_save`.
Keeps for backward: the sums, r a token; a mask of the input where there is dropout.
Not modelled: init_weights=bat, embeddings.
Mirrors peft/tuners/miss/layer.py MissLinear.forward, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import OnLinears, builder, check_rank, check_share, result_of
from peftplan.methods._linears import COMMON, ended
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

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_rank(self.r)
        check_share("miss_dropout", self.miss_dropout)
        if self.init_weights == "bat":
            raise Unsupported("method.init_weights=bat is not modelled yet; use true or mini")

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        if self.r > module.in_features:
            raise RequestError(f"--rank {self.r} is larger than the input of {module.path} ({module.in_features})")
        b, base = builder(module, host)
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
