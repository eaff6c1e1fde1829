"""SSF: what linear layers and norms give is scaled and shifted by learned vectors (Lian 2022, arXiv:2210.08823,
equation 3).

Trains: two vectors as wide as its output for every chosen linear layer and norm.
Keeps for backward: that output as it was, and the scale.
Not modelled: the embedding's output; norms of single heads.
As github.com/dongzelian/SSF, models/vision_transformer.py, ssf_ada: `x * scale + shift` behind each layer. Where the
vectors are of another dtype than x, the sum is cast to x's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Graph, Op, Region, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import Hold
from peftplan.methods._branches import OnLinears, builder
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Family, Host

HARMLESS = COMMON
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


@final
@dataclass(frozen=True)
class Ssf(OnLinears):
    family: ClassVar[Family] = "reparameterized"
    libraries: ClassVar[tuple[str, ...]] = ()

    norms: tuple[str, ...] = NORMS
    """Which norms; none where it is empty."""
    title: ClassVar[str] = "SSF"

    def default_targets(self, family: str) -> str:
        del family
        return "all-linear"

    def check(self) -> None:
        for name in self.norms:
            if name not in NORMS:
                raise RequestError(f"method.norms: {name!r} is not one of {', '.join(NORMS)}")

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        with b.marked(module.site, "scale"):
            out = moved(b, base, host)
            b.hold(base, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))

    def apply(self, graph: Graph, host: Host) -> Graph:
        adapted = OnLinears.apply(self, graph, host)
        return replace(adapted, regions=tuple(_behind_norms(r, self.norms, host) for r in adapted.regions))


def moved(b: Builder, x: Tensor, host: Host) -> Tensor:
    """`(x * scale + shift).to(x.dtype)`."""
    scale, shift = (b.weight(f"ssf_{n}", x.shape[-1], dtype=host.new_dtype, kind=ADAPTER) for n in ("scale", "shift"))
    return b.cast(b.add(b.mul(x, scale, label="ssf_scaled"), shift, label="ssf_sum"), x.dtype, label="ssf_out")


def _behind_norms(region: Region, wanted: tuple[str, ...], host: Host) -> Region:
    ops: list[Op] = []
    done = 0
    for path, start, end in _norms(region):
        if path not in wanted:
            continue
        out = next(op.out for op in reversed(region.ops[start:end]) if not isinstance(op, Hold))
        base = out._replace(name=f"{out.name}.base")
        b = Builder(host.numerics, f"{path}.")
        with b.marked("norm", "scale"):
            result = moved(b, base, host)
            b.hold(base)
        ops += [*region.ops[done:start], *writing(region.ops[start:end], out, base), *writing(b.ops, result, out)]
        done = end
    return replace(region, ops=(*ops, *region.ops[done:]))


def _norms(region: Region) -> Iterator[tuple[str, int, int]]:
    """(path, start, end) of every norm of the region: the ops under the name of its weight."""
    paths = [t.name.removesuffix(".weight") for t in region.params() if t.name.endswith("norm.weight")]
    spans = []
    for path in paths:
        mine = [i for i, op in enumerate(region.ops) if op.site == "norm" and op.name.startswith(f"{path}.")]
        spans.append((path, mine[0], mine[-1] + 1))
    return iter(sorted(spans, key=lambda span: span[1]))


METHOD = Ssf
EXAMPLES = (Ssf(), Ssf(target_modules=("o_proj", "down_proj"), norms=("norm",)))
UNVERIFIED: dict[str, str] = {}
