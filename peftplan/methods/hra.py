"""HRA: the weight times a chain of r Householder reflections (Yuan 2024, arXiv:2405.17484).

Trains: r in per adapted linear layer; plus `bias` and copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype, and per layer about r + 3 square matrices of the input's
width: the running product before every reflection, the identity, the base weight in fp32 and the turned weight; with
apply_GS three of them.
Not modelled: embeddings, packed bases (PEFT fails on them).
Mirrors peft/tuners/hra/layer.py HRALinear.forward and get_delta_weight, peft 0.21.2. The base layer is not called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Op, Tensor
from peftplan.graph.edit import Module
from peftplan.methods._branches import OnLinears, bias_of, builder, check_rank
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"init_weights"}


@final
@dataclass(frozen=True)
class Hra(OnLinears):
    """PEFT's HRAConfig."""

    r: int = 8
    apply_GS: bool = False  # noqa: N815 (PEFT's name)
    bias: Literal["none", "all", "hra_only"] = "none"
    title: ClassVar[str] = "HRA"
    returns_input: ClassVar[bool] = True
    no_4bit: ClassVar[str] = "PEFT turns the weight, which is not in the shape of one"
    no_8bit: ClassVar[str] = "PEFT turns the packed integers without their scales: its output is not the layer's"

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_rank(self.r)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        if self.r > module.in_features:
            raise RequestError(f"--rank {self.r} is larger than the input of {module.path} ({module.in_features})")
        b, _ = builder(module, host)
        wide, dtype = module.in_features, host.new_dtype
        with b.marked(module.site, "down"):
            eye = b.plain("eye", wide, wide, dtype=DType.float32)
            vectors = b.weight("hra_u", wide, self.r, dtype=dtype, kind=ADAPTER)
            turn = _orthogonal(b, vectors) if self.apply_GS else self._reflections(b, vectors)
            given = b.cast(eye, turn.dtype, label="eye_cast")
            once = b.matmul(given, turn, wide, wide, inner=wide, label="turn")
            b.hold(eye)
            base = b.cast(module.weight, once.dtype, label="base_weight")
            weight = b.matmul(base, once, module.out_features, wide, inner=wide, label="turned_weight")
            bias = bias_of(module)
            bias = None if bias is None else b.cast(bias, weight.dtype, label="bias_cast")
            x = b.cast(module.x, weight.dtype, label="hra_x")
        with b.marked(module.site, "extra"):
            out = b.cast(b.linear(x, weight, bias, label="hra"), module.x.dtype, label="out")
            b.hold(turn, base, weight, x, module.x, *(() if bias is None else (bias,)))
        return ended(b, out, module, name=self.title)

    def _reflections(self, b: Builder, u: Tensor) -> Tensor:
        """get_delta_weight: I - 2 W u u^T, one reflection after another."""
        wide = u.shape[0]
        u = b.alias(u)
        unit = b.div(u, b.norm(u, self.r), label="unit")
        weight = b.plain("identity", wide, wide, dtype=u.dtype)
        for _ in range(self.r):
            column = b.slice(unit, wide, 1, label="column")
            twice = b.scale(weight, label="twice")
            along = b.matmul(twice, column, wide, 1, inner=wide, label="along")
            outer = b.matmul(along, column.view(1, wide), wide, wide, inner=1, label="outer")
            weight = b.minus(weight, outer, label="reflected")
        b.hold(unit)
        return weight


def _orthogonal(b: Builder, u: Tensor) -> Tensor:
    """get_delta_weight with apply_GS: I - 2 U U^T, the columns of U made orthonormal by Gram and Schmidt."""
    wide, rank = u.shape
    u = b.alias(u)
    columns = [b.div(b.slice(u, wide, label="column"), b.norm(b.slice(u, wide, label="column")), label="unit")]
    columns = [columns[0].view(wide, 1)]
    rest = columns[0]
    for _ in range(1, rank):
        rest = b.slice(u, wide, 1, label="column")
        for unit in columns:
            along = b.matmul(unit.view(1, wide), rest, 1, 1, inner=wide, label="along")
            rest = b.minus(rest, b.mul(along, unit, label="part"), label="rest")
        columns.append(b.div(rest, b.norm(rest), label="unit"))
    joined = b.concat(tuple(columns), wide, rank)
    eye = b.plain("identity", wide, wide, dtype=u.dtype)
    outer = b.matmul(b.scale(joined, label="twice"), joined.view(rank, wide), wide, wide, inner=rank, label="outer")
    turn = b.minus(eye, outer, label="turned")
    b.hold(rest, joined)
    return turn


METHOD = Hra
EXAMPLES = (Hra(), Hra(r=3, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
