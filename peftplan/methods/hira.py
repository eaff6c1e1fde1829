"""HiRA: the weight times one plus a low-rank product, elementwise (Huang 2025, ICLR).

Trains: r (in + out) per adapted linear layer; plus copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype, the whole change of its weight, and a mask where there is
dropout.
Not modelled: embeddings, packed bases.
Mirrors peft/tuners/hira/layer.py Linear.forward and dispatch_default, peft 0.21.2, which gives every linear layer the
config's rank whatever `rank_pattern` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.graph.core import ADAPTER, Op
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import OnLinears, builder, check_rank, check_share
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host

HARMLESS = COMMON | {"init_weights", "rank_pattern"}


@final
@dataclass(frozen=True)
class Hira(OnLinears):
    """PEFT's HiraConfig."""

    r: int = 32
    hira_dropout: float = 0.0
    title: ClassVar[str] = "HiRA"
    packs: ClassVar[bool] = True

    def check(self) -> None:
        check_rank(self.r)
        check_share("hira_dropout", self.hira_dropout)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        wide, out = module.in_features, module.out_features
        a = b.weight("hira_A", self.r, wide, dtype=host.new_dtype, kind=ADAPTER)
        up = b.weight("hira_B", out, self.r, dtype=host.new_dtype, kind=ADAPTER)
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


METHOD = Hira
EXAMPLES = (Hira(r=8), Hira(r=3, target_modules="all-linear", hira_dropout=0.1))
UNVERIFIED: dict[str, str] = {}
