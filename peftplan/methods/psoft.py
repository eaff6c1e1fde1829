"""PSOFT: a rotation of each weight's leading singular directions (https://openreview.net/forum?id=FSHrinMArK).

Trains: r (r - 1) / 2 for the rotation and r for each of two vectors, per adapted linear layer; plus copies of
`modules_to_save`.
Keeps for backward: r numbers a token, in float32, and some r x r matrices; not the input. Beside the weights lie A
(r, in) and B (out, r) in float32; with `psoft_svd` full, A is a view that keeps all right singular vectors alive.
Not modelled: embeddings, packed bases (PEFT refuses them).
Mirrors peft/tuners/psoft/layer.py Linear.forward and OrthLayer.forward, peft 0.21.2. A's storage is as CUDA's solver
leaves it; LAPACK's on a CPU is cut to r rows.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Grad, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, builder, check_rank, check_share
from peftplan.methods._linears import COMMON, ended
from peftplan.methods._rotations import check_terms, neumann
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"psoft_alpha", "ab_svd_init", "psoft_svd_lowrank_niter", "random_seed", "init_weights"}
FP32 = DType.float32


@final
@dataclass(frozen=True)
class Psoft(OnLinears):
    """PEFT's PsoftConfig."""

    r: int = 32
    psoft_dropout: float = 0.0
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    title: ClassVar[str] = "PSOFT"
    reads_weight: ClassVar[bool] = True
    no_4bit: ClassVar[str] = "PEFT takes singular vectors of floating-point weights only"
    no_8bit: ClassVar[str] = no_4bit

    def check(self) -> None:
        check_rank(self.r)
        check_share("psoft_dropout", self.psoft_dropout)
        if self.use_cayley_neumann:
            check_terms(self.num_cayley_neumann_terms)
            if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
                raise RequestError(f"method.cayley_neumann_eps={self.cayley_neumann_eps}: must be between 0 and 1")

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        del host
        upper = 2 * len(chosen) * self._angles if self.psoft_orth else 0
        rows = [min(c.module.weight.shape) if self.psoft_svd == "full" else self.r for c in chosen]
        return (
            Tensor("@psoft_places", (upper,), DType.int64, BUFFER),
            Tensor(
                "@psoft_A", (sum(n * c.module.in_features for n, c in zip(rows, chosen, strict=True)),), FP32, BUFFER
            ),
            Tensor("@psoft_B", (sum(self.r * c.module.out_features for c in chosen),), FP32, BUFFER),
        )

    @property
    def _angles(self) -> int:
        return self.r * (self.r - 1) // 2

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        if self.r > min(module.weight.shape):
            raise RequestError(f"--rank {self.r}: {module.path} has only {min(module.weight.shape)} singular values")
        b, base = builder(module, host)
        a = Tensor("@psoft_A", (self.r, module.in_features), FP32, BUFFER)
        up = Tensor("@psoft_B", (module.out_features, self.r), FP32, BUFFER)
        with b.marked(module.site, "down"):
            x = b.cast(module.x, FP32, label="psoft_x")
            given = b.dropout(x, self.psoft_dropout)
            down = b.linear(given, a, label="psoft_A")
            turned = self._turned(b, down, host)
        with b.marked(module.site, "up"):
            change = b.linear(b.minus(turned, down, label="moved"), up, label="psoft_B")
        with b.marked(module.site, "extra"):
            out = b.cast(b.add(base, b.scale(change), label="sum"), base.dtype, label="out")
            b.hold(x, given, down, turned, change, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))

    def _turned(self, b: Builder, down: Tensor, host: Host) -> Tensor:
        """OrthLayer.forward."""
        matrix = self._matrix(b, host.new_dtype)
        dtype = FP32 if b.numerics.backend == "cpu" and down.dtype.is_half else down.dtype
        given = b.cast(down, dtype, label="down_wide")
        turned = b.linear(given, b.cast(matrix, dtype, label="R_wide"), label="psoft_R")
        out = b.cast(turned, down.dtype, label="turned")
        b.hold(matrix)
        return out

    def _matrix(self, b: Builder, dtype: DType) -> Tensor:
        """OrthLayer.get_matrix: the rotation between its two vectors."""
        shape = (self._angles,) if self.psoft_orth else (self.r, self.r)
        weight = b.weight("psoft_R.weight", *shape, dtype=dtype, kind=ADAPTER)
        after, before = (b.weight(f"psoft_R.vector_{n}", self.r, dtype=dtype, kind=ADAPTER) for n in "ba")
        b.hold(weight, *([after] if self.psoft_mag_b else []), *([before] if self.psoft_mag_a else []))
        matrix, held = self._rotation(b, weight) if self.psoft_orth else (weight, ())
        if self.psoft_mag_b:
            matrix = b.mul(after.view(self.r, 1), matrix, label="scaled_rows")
        if self.psoft_mag_a:
            matrix = b.mul(matrix, before.view(1, self.r), label="scaled_columns")
        out = b.cast(matrix, dtype, label="R")
        b.hold(*held, matrix)
        return out

    def _rotation(self, b: Builder, weight: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Cayley's transform of the skew-symmetric matrix, and the locals that outlive it."""
        shape = (self.r, self.r)
        zeros = b.plain("zeros", *shape, dtype=weight.dtype)
        upper = b.formula("upper", zeros, zeros, weight, grads=(Grad(weight, weight.logical_bytes),))
        skew = b.minus(upper, upper, label="skew")
        eye = b.plain("identity", *shape, dtype=weight.dtype)
        if self.use_cayley_neumann:
            start = b.plain("rotation", *shape, dtype=weight.dtype)
            if self.cayley_neumann_eps is not None:
                skew = _bounded(b, skew)
            total, powers = neumann(b, start, skew, self.num_cayley_neumann_terms)
            return total, (*powers, eye)
        wide = b.cast(skew, FP32 if skew.dtype.is_half else skew.dtype, label="skew_wide")
        return b.solve(b.minus(eye, wide, label="minus"), b.add(eye, wide, label="plus")), (wide, eye)


def _bounded(b: Builder, skew: Tensor) -> Tensor:
    """_project_Q where the norm is above the bound: at least as much as where it is below."""
    norm = b.norm(skew)
    shifted = b.add_const(norm)
    grads = (Grad(shifted, shifted.logical_bytes),)
    inverse = b.formula("inverse", shifted, shifted, keeps_out=True, grads=grads)
    out = b.mul(skew, b.scale(inverse), label="bounded")
    b.hold(norm)
    return out


METHOD = Psoft
EXAMPLES = (Psoft(r=8), Psoft(r=5, target_modules="all-linear", use_cayley_neumann=True, psoft_mag_a=False))
UNVERIFIED: dict[str, str] = {}
