"""SHiRA: a sparse change of each weight, at places drawn at random (Bhardwaj 2024, arXiv:2406.13175).

Trains: r (in + out) numbers per adapted linear layer; plus copies of `modules_to_save`.
Keeps for backward: the layer's input, and a whole copy of its weight with the numbers added, in the model's dtype; the
numbers and their places (int64). Beside the weights lie the places (int32).
Not modelled: embeddings, packed layers with a bias; inside the sum with a sparse tensor of another dtype, a copy of the
weight in float32.
Mirrors peft/tuners/shira/layer.py Linear.forward and get_delta_weight, peft 0.21.2. The base layer is not called: a
packed weight is unpacked, of 4 bits to the dtype it came from, of 8 to float32, and must be of the input's dtype.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Grad, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, bias_of, builder, check_rank
from peftplan.methods._linears import COMMON, ended, layer_of, packed, unpacked
from peftplan.methods.base import Family, Host
from peftplan.units import DType

HARMLESS = COMMON | {"mask_type", "random_seed", "init_weights"}


@final
@dataclass(frozen=True)
class Shira(OnLinears):
    """PEFT's ShiraConfig."""

    r: int = 32
    family: ClassVar[Family] = "selective"
    title: ClassVar[str] = "SHiRA"
    layers: ClassVar[frozenset[str]] = frozenset({"gptq"})
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform")

    def check(self) -> None:
        check_rank(self.r)

    def _count(self, module: Module) -> int:
        count = self.r * sum(module.weight.shape)
        if count > module.weight.numel:
            raise RequestError(
                f"--rank {self.r}: {count} numbers are more than {module.path} has ({module.weight.numel}); lower it"
            )
        return count

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        del host
        return (Tensor("@shira_indices", (2, sum(self._count(c.module) for c in chosen)), DType.int32, BUFFER),)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        apart = layer_of(module) == "gptq"
        count = self._count(module)
        values = b.weight("shira_weight", count, dtype=host.new_dtype, kind=ADAPTER)
        with b.marked(module.site, "down"):
            new = _zeros(b, module, base) if apart else _copied(b, module)
            scaled = b.scale(values, label="scaled")
            places = b.plain("places", 2, count, dtype=DType.int64)
            sparse = Tensor("", module.weight.shape, scaled.dtype, base=scaled.storage)
            grads = (Grad(scaled, scaled.logical_bytes, places.nbytes),)
            change = b.formula("sparse", sparse, scaled, keeps=(scaled, places), grads=grads)
            new = b.add_into(new, change, label="added")
            out = b.linear(module.x, new, None if apart else bias_of(module), label="shira")
        with b.marked(module.site, "extra"):
            out = b.add(base, out, label="sum") if apart else out
            b.hold(new, module.x)
        own = writing(module.ops, module.out, base) if apart else ()
        return (*own, *ended(b, out, module, name=self.title))


def _copied(b: Builder, module: Module) -> Tensor:
    return b.copy(module.weight if packed(module) is None else _unpacked(b, module), label="new_weight")


def _zeros(b: Builder, module: Module, base: Tensor) -> Tensor:
    """Where PEFT cannot read the weight, it adds the product with the changes alone."""
    return b.cast(b.plain("zeros", *module.weight.shape, dtype=DType.float32), base.dtype, label="new_weight")


def _unpacked(b: Builder, module: Module) -> Tensor:
    """get_base_weight of a packed layer."""
    if bias_of(module) is not None:
        raise Unsupported("SHiRA on packed layers with a bias is not modelled; use an unquantized --format")
    weight = unpacked(b, module)
    if b.numerics.autocast is None and weight.dtype is not module.x.dtype:
        raise RequestError(
            f"PEFT's SHiRA multiplies {module.x.dtype.label} by {weight.dtype.label} in {module.path}, which torch "
            f"refuses; set format.prepare={str(module.x.dtype.is_half).lower()}"
        )
    return weight


METHOD = Shira
EXAMPLES = (Shira(r=8), Shira(r=3, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
