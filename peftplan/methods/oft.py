"""OFT: the input is turned by orthogonal blocks before the layer (Qiu 2023, arXiv:2306.07280, section 3).

Trains: (in / b) b (b - 1) / 2 per adapted linear layer with blocks of b, one block's worth with `block_share`; plus
`bias` and copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype, the blocks, and the powers of their skew-symmetric
generators (Cayley's transform as a Neumann series), or with use_cayley_neumann=false what a linear solve keeps.
Not modelled: embeddings.
Mirrors peft/tuners/oft/layer.py Linear.forward and OFTRotationModule.forward, peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, builder
from peftplan.methods._linears import BACKENDS, COMMON, ended
from peftplan.methods._rotations import check_terms, neumann
from peftplan.methods._solve import cayley
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"module_dropout", "eps", "init_weights"}
"""PEFT 0.21.2 makes a dropout layer and never calls it."""


@final
@dataclass(frozen=True)
class Oft(OnLinears):
    """PEFT's OFTConfig; `r` counts blocks, and either it or `oft_block_size` is 0."""

    r: int = 0
    oft_block_size: int = 32
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    coft: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    title: ClassVar[str] = "OFT"
    layers: ClassVar[frozenset[str]] = BACKENDS
    returns_input: ClassVar[bool] = True

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        if self.r < 0 or self.oft_block_size < 0 or (self.r == 0) == (self.oft_block_size == 0):
            raise RequestError(
                f"method.r={self.r} and method.oft_block_size={self.oft_block_size}: set one of them, the other to 0"
            )
        if self.use_cayley_neumann:
            check_terms(self.num_cayley_neumann_terms)

    def _blocks(self, width: int) -> tuple[int, int]:
        """(how many, how large) for an input of `width`: the nearest divisor of it, the smaller of two."""
        if self.r:
            count = _nearest_divisor(width, self.r)
            return count, width // count
        size = _nearest_divisor(width, self.oft_block_size)
        return width // size, size

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        """Each module's `rows` and `cols`: where its weights go in a block."""
        del host
        sizes = (self._blocks(c.module.in_features)[1] for c in chosen)
        return tuple(
            Tensor(f"@oft.{n}", (2, size * (size - 1) // 2), DType.int64, BUFFER) for n, size in enumerate(sizes)
        )

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        x = module.x
        with b.marked(module.site, "down"):
            wide = b.cast(x, host.new_dtype, label="oft_x")
            turned = self._rotate(b, wide, module.in_features, host.new_dtype)
            given = b.cast(turned, x.dtype, label="oft_given")
        ahead, b.ops = tuple(b.ops), []
        with b.marked(module.site, "extra"):
            b.hold(given)
            out = b.cast(base, x.dtype, label="out")
            b.hold(turned, x)
        inner = writing(writing(module.ops, x, given), module.out, base)
        if out is base:
            return (*ahead, *writing(inner, base, module.handed), *b.ops)
        return (*ahead, *inner, *ended(b, out, module, name=self.title))

    def _rotate(self, b: Builder, x: Tensor, width: int, dtype: DType) -> Tensor:
        """OFTRotationModule.forward: every block of the input times its rotation, one batched product."""
        count, size = self._blocks(width)
        mine = 1 if self.block_share else count
        weight = b.weight("oft_R.weight", mine, size * (size - 1) // 2, dtype=dtype, kind=ADAPTER)
        if self.coft:
            _projected(b, weight, (mine, size, size))
        rotation = self._cayley(b, weight, mine, size)
        if self.block_share:
            rotation = b.copy(rotation, count, size, size, label="shared", grad_copied=count > 1)
        tokens = x.numel // width
        blocks = b.view(x, count, tokens, size, label="blocks", grad_copied=True)
        product = b.matmul(blocks, rotation, count, tokens, size, inner=size, label="rotated")
        out = b.cast(b.copy(product, *x.shape, label="joined"), x.dtype, label="rotated_wide")
        b.hold(x, rotation, product, out)
        return out

    def _cayley(self, b: Builder, weight: Tensor, count: int, size: int) -> Tensor:
        """I + 2 Q + 2 Q^2 + ... + Q^n, summed in place."""
        shape = (count, size, size)
        zeros = b.plain("skew_zeros", *shape, dtype=weight.dtype)
        filled = b.put(zeros, weight, label="skew_upper")
        skew = b.add(filled, b.view(filled, label="skew_lower", grad_copied=True), label="skew")
        if not self.use_cayley_neumann:
            return b.cast(cayley(b, skew), weight.dtype, label="rotation")
        total = b.plain("rotation", *shape, dtype=weight.dtype)
        total, powers = neumann(b, total, skew, self.num_cayley_neumann_terms)
        b.hold(*powers)
        return total


def _projected(b: Builder, weight: Tensor, shape: tuple[int, int, int]) -> None:
    """_project_batch, without gradient: the blocks are drawn towards the identity, in place."""
    blocks = b.plain("coft_blocks", *shape, dtype=weight.dtype, ins=(weight,))
    zeros = b.plain("coft_zeros", *shape[1:], dtype=weight.dtype)
    apart = b.plain("coft_apart", *shape, dtype=weight.dtype, ins=(blocks, zeros))
    unit = b.plain("coft_unit", *shape, dtype=weight.dtype, ins=(apart,))
    near = b.plain("coft_near", *shape, dtype=weight.dtype, ins=(unit,))
    chosen = b.plain("coft_chosen", *shape, dtype=weight.dtype, ins=(blocks, near))
    b.hold(blocks, zeros, apart)
    b.plain("coft_upper", *weight.shape, dtype=weight.dtype, ins=(chosen,))


def _nearest_divisor(width: int, wanted: int) -> int:
    if wanted >= width:
        return width
    higher = next(n for n in range(wanted, width + 1) if width % n == 0)
    lower = next(n for n in range(wanted, 0, -1) if width % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


METHOD = Oft
EXAMPLES = (Oft(), Oft(r=4, oft_block_size=0, target_modules="all-linear"), Oft(oft_block_size=8, block_share=True))
UNVERIFIED: dict[str, str] = {}
