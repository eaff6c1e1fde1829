"""BOFT: the input is turned by a block-diagonal orthogonal matrix, the output scaled (Liu 2023, arXiv:2311.06243).

Trains: in x block + out per adapted linear layer, blocks of boft_block_size (or in / boft_block_num); plus `bias` and
copies of `modules_to_save`.
Keeps for backward: the layer's input and output, and per layer three square matrices of the input's width: the
permutation, the identity and the rotation.
Not modelled: boft_n_butterfly_factor above 1 (without its CUDA extension, as on a CPU, PEFT makes it 1),
boft_dropout, embeddings.
Mirrors peft/tuners/boft/layer.py Linear.forward and cayley_batch without that extension, peft 0.21.2. The permutation
is a buffer on the CPU, whatever the model's device.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Grad, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, bias_of, builder
from peftplan.methods._linears import BACKENDS, COMMON, ended, fed
from peftplan.methods._solve import cayley
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"init_weights"}
FP32 = DType.float32


@final
@dataclass(frozen=True)
class Boft(OnLinears):
    """PEFT's BOFTConfig; either boft_block_size or boft_block_num is 0."""

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    bias: Literal["none", "all", "boft_only"] = "none"
    title: ClassVar[str] = "BOFT"
    layers: ClassVar[frozenset[str]] = BACKENDS
    returns_input: ClassVar[bool] = True

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        size, count = self.boft_block_size, self.boft_block_num
        if min(size, count) < 0 or (size == 0) == (count == 0):
            raise RequestError(
                f"method.boft_block_size={size}, boft_block_num={count}: set one of them, the other to 0"
            )
        if self.boft_dropout:
            raise Unsupported(f"method.boft_dropout={self.boft_dropout} is not modelled; leave it out")

    def _blocks(self, module: Module) -> tuple[int, int]:
        """(how many, how large)."""
        wide, given = module.in_features, self.boft_block_size or self.boft_block_num
        if wide % given:
            raise RequestError(f"BOFT blocks of or by {given} do not fit the input of {module.path} ({wide})")
        return (wide // given, given) if self.boft_block_size else (given, wide // given)

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        if host.numerics.backend != "cpu":
            return ()
        return (Tensor("@boft_P", (sum(c.module.in_features**2 for c in chosen),), FP32, BUFFER),)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        if self.boft_n_butterfly_factor != 1 and host.numerics.backend == "cuda":
            raise Unsupported("method.boft_n_butterfly_factor above 1 needs PEFT's CUDA extension, not modelled; use 1")
        b, base = builder(module, host)
        x, wide = module.x, module.in_features
        with b.marked(module.site, "down"):
            eye = b.plain("eye", wide, wide, dtype=x.dtype)
            ones = b.plain("ones", module.out_features, 1, dtype=x.dtype)
            rotation, held = self._rotation(b, module, host)
            rotation = b.cast(b.matmul(rotation, eye, wide, wide, inner=wide, label="rotation"), x.dtype, label="R")
            scale = b.weight("boft_s", module.out_features, 1, dtype=host.new_dtype, kind=ADAPTER)
            scale = b.mul(scale, ones, label="boft_scale").view(module.out_features)
            turned = b.matmul(x.view(x.numel // wide, wide), rotation, *x.shape, inner=wide, label="x_rotated")
        ahead, b.ops = tuple(b.ops), []
        own, made = fed(module, turned)
        base = base._replace(dtype=made.dtype)
        with b.marked(module.site, "extra"):
            bias = bias_of(module)
            bias = None if bias is None else b.alias(bias)
            result = b.mul(base if bias is None else b.minus(base, bias), scale, label="scaled")
            result = result if bias is None else b.add(result, bias, label="with_bias")
            out = b.cast(result, x.dtype, label="out")
            b.hold(*held, rotation, scale, turned, x, *((result,) if out is not result else ()))
        return (*ahead, *writing(own, made, base), *ended(b, out, module, name=self.title))

    def _rotation(self, b: Builder, module: Module, host: Host) -> tuple[Tensor, tuple[Tensor, ...]]:
        """P Q P^T with Q block-diagonal, and the locals that outlive it."""
        count, size = self._blocks(module)
        wide, dtype = module.in_features, module.x.dtype
        weight = b.weight("boft_R", 1, count, size, size, dtype=host.new_dtype, kind=ADAPTER)
        q = self._cayley(b, b.alias(weight).view(count, size, size))
        whole = Tensor("", (wide, wide), q.dtype)
        whole = b.formula("block_diag", whole, q, grads=(Grad(q, q.logical_bytes),))
        given = Tensor("@boft_P", (wide, wide), FP32, BUFFER)
        cpu = b.numerics.backend == "cpu"
        p = b.cast(given, dtype, label="boft_P") if cpu else b.plain("boft_P", wide, wide, dtype=dtype)
        diagonal = b.cast(whole, dtype, label="diagonal")
        half = b.matmul(diagonal, p, wide, wide, inner=wide, label="QP")
        full = b.matmul(p, half, wide, wide, inner=wide, label="PQP")
        return b.slice(full, wide, wide, label="first"), (diagonal, full)

    def _cayley(self, b: Builder, r: Tensor) -> Tensor:
        """cayley_batch: (I - S)(I + S)^-1 with S the skew-symmetric part."""
        skew = b.scale(b.minus(r, r, label="skew"), label="half_skew")
        return b.cast(cayley(b, skew), r.dtype, label="Q")


METHOD = Boft
EXAMPLES = (Boft(), Boft(boft_block_size=0, boft_block_num=4, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
