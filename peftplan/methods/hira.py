"""HiRA: the weight times one plus a low-rank product, elementwise (Huang 2025, ICLR).

Trains: r (in + out) per adapted linear layer; plus copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype, the whole change of its weight, and a mask where there is
dropout.
Not modelled: embeddings.
Mirrors peft/tuners/hira/layer.py Linear.forward and dispatch_default, and hira/bnb.py Linear4bit and
Linear8bitLt.forward, which unpack the whole weight and keep it, peft 0.21.2; they give every linear layer the config's
rank whatever `rank_pattern` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import OnLinears, builder, check_rank, check_share, result_of
from peftplan.methods._linears import COMMON, ended, packed, sees_autocast, unpacked
from peftplan.methods.base import Host

HARMLESS = COMMON | {"init_weights", "rank_pattern"}


@final
@dataclass(frozen=True)
class Hira(OnLinears):
    """PEFT's HiraConfig."""

    r: int = 32
    hira_dropout: float = 0.0
    title: ClassVar[str] = "HiRA"

    def check(self) -> None:
        check_rank(self.r)
        check_share("hira_dropout", self.hira_dropout)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        wide, out = module.in_features, module.out_features
        a = b.weight("hira_A", self.r, wide, dtype=host.new_dtype, kind=ADAPTER)
        up = b.weight("hira_B", out, self.r, dtype=host.new_dtype, kind=ADAPTER)
        if packed(module) is not None:
            return self._packed(b, module, (base, a, up), converts=not sees_autocast(host))
        with b.marked(module.site, "down"):
            product = b.matmul(a, up, wide, out, inner=self.r, label="hira_AB")
            x = b.cast(module.x, host.new_dtype, label="hira_x")
            given = b.dropout(x, self.hira_dropout)
            weight = b.mul(module.weight, product.view(out, wide), label="hira_weight")
            change = b.linear(given, weight, label="hira")
        with b.marked(module.site, "extra"):
            total = b.add(base, change, label="sum")
            result = b.cast(total, base.dtype, label="out")
            b.hold(product, given, x, change, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, result, module, name=self.title))

    def _packed(
        self, b: Builder, module: Module, given: tuple[Tensor, Tensor, Tensor], *, converts: bool
    ) -> tuple[Op, ...]:
        """bnb.py: an 8-bit weight is unpacked before the base runs, a 4-bit one after it."""
        base, a, up = given
        kernel = packed(module)
        with b.marked(module.site, "down"):
            whole = unpacked(b, module) if kernel is not None and not kernel.adapters_clone else None
            ahead, b.ops = tuple(b.ops), []
            result = result_of(b, base, module)
            whole = unpacked(b, module) if whole is None else whole
            x = b.cast(module.x, a.dtype, label="hira_x") if converts else module.x
            dropped = b.dropout(x, self.hira_dropout)
            product = b.matmul(up, a, *module.weight.shape, inner=self.r, label="hira_BA")
            weight = b.mul(whole, product, label="hira_weight")
            change = b.linear(dropped, weight, label="hira")
        with b.marked(module.site, "extra"):
            change = b.cast(change, base.dtype, label="hira_cast") if converts else change
            total = b.add(result, change, label="sum")
            total = b.cast(total, base.dtype, label="out") if converts else total
            b.hold(whole, product, dropped, weight, x, change, module.x)
        inner = writing(module.ops, module.out, base)
        return (*ahead, *inner, *ended(b, total, module, name=self.title))


METHOD = Hira
EXAMPLES = (Hira(r=8), Hira(r=3, target_modules="all-linear", hira_dropout=0.1))
UNVERIFIED: dict[str, str] = {}
