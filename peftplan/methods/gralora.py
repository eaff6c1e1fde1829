"""GraLoRA: the weight cut into k x k blocks, each with its own LoRA (Jung 2025, arXiv:2505.20355).

Trains: (r + hybrid_r) (in + out) per adapted linear layer; plus `bias` and copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype (twice with hybrid_r), r numbers a token for each of k
blocks, and a mask where there is dropout.
Not modelled: embeddings.
Mirrors peft/tuners/gralora/layer.py Linear.forward, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import OnLinears, builder, check_rank, check_share
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host

HARMLESS = COMMON | {"alpha", "init_weights"}


@final
@dataclass(frozen=True)
class Gralora(OnLinears):
    """PEFT's GraloraConfig."""

    r: int = 32
    hybrid_r: int = 0
    gralora_k: int = 2
    gralora_dropout: float = 0.0
    bias: Literal["none", "all", "gralora_only"] = "none"
    title: ClassVar[str] = "GraLoRA"
    returns_input: ClassVar[bool] = True
    in_place: ClassVar[bool] = True
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_rank(self.r)
        check_share("gralora_dropout", self.gralora_dropout)
        if self.hybrid_r < 0 or self.gralora_k < 1:
            raise RequestError(f"method.hybrid_r={self.hybrid_r}, gralora_k={self.gralora_k}: use at least 0 and 1")
        if self.r % self.gralora_k:
            raise RequestError(f"--rank {self.r}: must be a multiple of method.gralora_k={self.gralora_k}")

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        if module.in_features % self.gralora_k or module.out_features % self.gralora_k:
            raise RequestError(f"method.gralora_k={self.gralora_k} does not divide the sides of {module.path}")
        b, base = builder(module, host)
        with b.marked(module.site, "down"):
            output = self._blocks(b, module, host)
        with b.marked(module.site, "extra"):
            total = b.add_into(base, b.scale(b.cast(output, base.dtype, label="delta"), label="scaled"))
            if self.hybrid_r:
                hybrid = self._hybrid(b, module, host)
                total = b.add_into(total, b.scale(b.cast(hybrid, base.dtype, label="delta"), label="scaled"))
                b.hold(hybrid)
            out = b.cast(total, module.x.dtype, label="out")
            b.hold(output, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))

    def _input(self, b: Builder, module: Module, host: Host) -> Tensor:
        return b.dropout(b.cast(module.x, host.new_dtype, label="gralora_x"), self.gralora_dropout)

    def _blocks(self, b: Builder, module: Module, host: Host) -> Tensor:
        """Two batched products with a change of places between them."""
        k, r, dtype, x = self.gralora_k, self.r, host.new_dtype, module.x
        wide, out, tokens = module.in_features // k, module.out_features // k, x.numel // module.in_features
        several = k > 1
        a = b.weight("gralora_A", k, wide, r, dtype=dtype, kind=ADAPTER)
        up = b.weight("gralora_B", k, r, out, dtype=dtype, kind=ADAPTER)
        blocks = b.view(self._input(b, module, host), k, tokens, wide, label="blocks", grad_copied=several)
        down = b.matmul(blocks, a, k, tokens, r, inner=wide, label="gralora_A")
        if several:
            down = b.copy(down, label="exchanged", grad_copied=True)
        wide_out = b.matmul(down, up, k, tokens, out, inner=r, label="gralora_B")
        shape = (*x.shape[:-1], module.out_features)
        return b.copy(wide_out, *shape, label="joined") if several else wide_out.view(*shape)

    def _hybrid(self, b: Builder, module: Module, host: Host) -> Tensor:
        dtype = host.new_dtype
        a = b.weight("gralora_A_general.weight", self.hybrid_r, module.in_features, dtype=dtype, kind=ADAPTER)
        up = b.weight("gralora_B_general.weight", module.out_features, self.hybrid_r, dtype=dtype, kind=ADAPTER)
        return b.linear(b.linear(self._input(b, module, host), a, label="general_A"), up, label="general_B")


METHOD = Gralora
EXAMPLES = (Gralora(r=8), Gralora(r=4, hybrid_r=3, target_modules="all-linear", gralora_dropout=0.1))
UNVERIFIED: dict[str, str] = {}
