"""DEFT: a part of the layer's output is projected away, and LoRA's put in its place (PEFT 0.21.2's DeftConfig).

Trains: r (in + out) per adapted linear layer, r out with `para`; plus `bias` and copies of `modules_to_save`.
Keeps for backward: the layer's output in fp32, its input in fp32 (not with `para`), r numbers a token once or twice,
and a mask where there is dropout.
Not modelled: embeddings, 4-bit bases (PEFT fails on them).
Mirrors peft/tuners/deft/layer.py Linear.forward and _project, peft 0.21.2. Everything runs in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Need, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import internal
from peftplan.methods._branches import OnLinears, bias_of, builder, check_rank, check_share
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"init_scale", "alpha", "init_weights"}
FP32 = DType.float32


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Qr(Op):
    """torch.linalg.qr of a tall matrix, Q alone read: keeps Q and R.

    Backward: Q^T times the gradient, Q times what is above its diagonal, and a triangular solve (FunctionsManual.cpp,
    linalg_qr_backward).
    """

    triangle: Tensor
    multiplies_back = True

    def grad_flops(self, need: Need) -> int:
        return 4 * self.out.numel * self.out.shape[1] if self.ins[0].name in need else 0

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (self.out, self.triangle) if self.ins[0].name in need else ()

    def scratch_bytes(self) -> int:
        return self.triangle.nbytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        p = self.ins[0]
        return (Grad(p, p.nbytes, p.nbytes),) if p.name in need else ()


@final
@dataclass(frozen=True)
class Deft(OnLinears):
    """PEFT's DeftConfig."""

    r: int = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    para: bool = False
    deft_dropout: float = 0.0
    bias: Literal["none", "all", "deft_only"] = "none"
    title: ClassVar[str] = "DEFT"
    reads_weight: ClassVar[bool] = True
    returns_input: ClassVar[bool] = True
    no_4bit: ClassVar[str] = "PEFT starts it from a product with the weight, which is not in the shape of one"

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_rank(self.r)
        check_share("deft_dropout", self.deft_dropout)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        dtype, out = host.new_dtype, module.out_features
        weight = b.weight("deft_P", out, self.r, dtype=dtype, kind=ADAPTER)
        inject = None if self.para else b.weight("deft_R", self.r, module.in_features, dtype=dtype, kind=ADAPTER)
        with b.marked(module.site, "down"):
            b.hold(weight, *(() if inject is None else (inject,)))  # in the order they are registered in
            result = b.cast(base, FP32, label="base32")
            bias = bias_of(module)
            product = result if bias is None else b.minus(result, b.cast(bias, FP32, label="bias32"), label="product")
            x = b.cast(module.x, FP32, label="deft_x")
            p = b.cast(b.alias(weight), FP32, label="P32")
            right = b.squash(p, label="right") if self.decomposition_method == "relu" else None
            p, right = (p, right) if right is not None else _basis(b, p)
        with b.marked(module.site, "up"):
            correction = self._back(b, self._along(b, product, right), p, base)
            result = b.minus(result, correction, label="removed")
            held: tuple[Tensor, ...] = (product, correction)
            if inject is not None:
                scaled = b.scale(b.cast(inject, FP32, label="R32"), label="R")
                given = b.dropout(x, self.deft_dropout)
                result = b.add(result, self._back(b, b.linear(given, scaled, label="R_x"), p, base), label="sum")
                held = (*held, scaled, given)
        with b.marked(module.site, "extra"):
            final_ = b.cast(result, module.x.dtype, label="out")
            b.hold(base, *held, right, p, x, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, final_, module, name=self.title))

    def _along(self, b: Builder, product: Tensor, right: Tensor) -> Tensor:
        """base_product @ right."""
        tokens, out = product.numel // right.shape[0], right.shape[0]
        return b.matmul(product.view(tokens, out), right, tokens, self.r, inner=out, label="along")

    def _back(self, b: Builder, inner: Tensor, p: Tensor, base: Tensor) -> Tensor:
        """inner @ P^T."""
        return b.matmul(inner, p.view(self.r, p.shape[0]), *base.shape, inner=self.r, label="back")


def _basis(b: Builder, p: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.qr, of which Q is read twice."""
    name = b.name("qr")
    triangle = internal(name, "R", (p.shape[1], p.shape[1]), p.dtype)
    q = Tensor(name, p.shape, p.dtype)
    b.ops.append(Qr(name=name, ins=(p,), out=q, triangle=triangle, part="down"))
    return q, q


METHOD = Deft
EXAMPLES = (Deft(), Deft(r=3, para=True, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
