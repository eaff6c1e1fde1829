"""A packed layer that is one node of autograd's: a product with a weight that forward and backward unpack anew."""

from __future__ import annotations

from typing import Literal, NamedTuple

from peftplan.formats._packing import biases
from peftplan.graph.builder import Builder
from peftplan.graph.core import Tensor
from peftplan.graph.edit import Module
from peftplan.graph.ops import PackedLinear
from peftplan.units import DType

Saves = tuple[Literal["input", "weight"], ...]


class Unpacking(NamedTuple):
    """What making the weight takes: `peak_bytes` while it is made, `kept_bytes` of it during the product."""

    peak_bytes: int
    kept_bytes: int

    def beside(self, made_bytes: int) -> int:
        """Temporaries alive together with what the product writes, which is not there yet at the peak."""
        return max(self.kept_bytes, self.peak_bytes - made_bytes)


def packed_linear(
    b: Builder, module: Module, weight: Tensor, *, saves: Saves, layer: str, unpacking: tuple[Unpacking, Unpacking],
    dtype: DType | None = None, bias: Literal["inside", "in place", "after"] = "inside",
) -> Tensor:  # fmt: skip
    """The layer's output, where forward and backward unpack the weight as `unpacking` says.

    The bias is added within the node to a new tensor (`inside`) or in place, or by an operator `after` it.
    """
    x, given = module.x, biases(module)
    name = b.name("base_packed")
    out = module.out._replace(name=name, dtype=dtype or x.dtype)
    forward, backward = unpacking
    summed = out.nbytes if given and bias == "inside" else 0
    b.ops.append(
        PackedLinear(
            name=name,
            ins=(x, weight, *(given if bias != "after" else ())),
            out=out,
            site=module.site,
            forward_workspace_bytes=max(forward.beside(out.nbytes), summed),
            backward_workspace_bytes=backward.beside(x.nbytes),
            saves=saves,
            layer=layer,
        )
    )
    for one in given if bias == "after" else ():
        out = b.add(out, one, label="base_biased")
    return out
