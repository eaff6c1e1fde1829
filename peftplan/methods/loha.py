"""LoHa: the weight changes by (w1a w1b) * (w2a w2b), elementwise (Hyeon-Woo 2022, arXiv:2108.06098, section 2.2).

Trains: 2 r (in + out) per adapted linear layer; plus copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype and the whole change of its weight.
Not modelled: module_dropout skips a layer's branch at random: a step that skips none is meant, which errs high;
embeddings, 4-bit bases (PEFT fails on them).
Mirrors peft/tuners/loha/layer.py Linear.forward and HadaWeight, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Need, Op, Tensor
from peftplan.graph.edit import Module
from peftplan.methods import _lycoris
from peftplan.units import DType

HARMLESS = _lycoris.HARMLESS


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class HadaWeight(Op):
    """peft's autograd function: ins = (w1a, w1b, w2a, w2b, and the scale where that is not on the host); keeps them,
    and makes the two products again in backward.

    Forward: two products and their product at once. Backward: the scaled gradient, the product before, its factor
    and the one before that, at once, while the first two gradients are there.
    """

    def _product_flops(self) -> int:
        return 2 * self.out.numel * self.ins[1].shape[0]

    def flops(self) -> int:
        return 2 * self._product_flops()

    def grad_flops(self, need: Need) -> int:  # noqa: ARG002
        return 6 * self._product_flops()

    def saved(self, need: Need) -> tuple[Tensor, ...]:  # noqa: ARG002
        return self.ins

    def scratch_bytes(self) -> int:
        return 2 * self.out.nbytes

    def backward(self, need: Need) -> tuple[Grad, ...]:  # noqa: ARG002
        full = self.out.numel * max(self.out.dtype.size, self.ins[0].dtype.size)
        scratch = self.out.nbytes + 3 * full
        return tuple(Grad(t, t.nbytes, scratch if t is self.ins[1] else 0) for t in self.ins[:4])


@final
@dataclass(frozen=True)
class Loha(_lycoris.Lycoris):
    """PEFT's LoHaConfig, the knobs that change memory."""

    title: ClassVar[str] = "LoHa"
    no_4bit: ClassVar[str] = "PEFT gives the change the packed weight's shape, which is not the layer's"

    def delta(self, b: Builder, module: Module, rank: int, dtype: DType) -> Tensor:
        """HadaWeight.apply; its products obey autocast."""
        shapes = ((module.out_features, rank), (rank, module.in_features))
        weights = tuple(
            b.weight(f"hada_{n}", *shape, dtype=dtype, kind=ADAPTER)
            for n, shape in (("w1_a", shapes[0]), ("w1_b", shapes[1]), ("w2_a", shapes[0]), ("w2_b", shapes[1]))
        )
        b.hold(*weights)  # in the order they are registered in, before they are cast in another
        scale = (b.plain("hada_scale", dtype=DType.float32),) if b.numerics.backend == "cpu" else ()
        for i in (1, 0, 3, 2):
            b.autocast(weights[i])
        name = b.name("hada_weight")
        out = Tensor(name, (module.out_features, module.in_features), b.numerics.autocast or dtype)
        b.ops.append(HadaWeight(name=name, ins=(*weights, *scale), out=out, site=module.site, part="down"))
        return out


METHOD = Loha
EXAMPLES = (Loha(), Loha(r=3, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
