"""AdaMSS: low-rank changes of clusters of a weight's rows, each in the weight's own row space (Zheng 2025, NeurIPS).

Trains: per adapted linear layer and cluster of its rows, subspace_rank (r + rows); plus copies of `modules_to_save`.
Keeps for backward: r numbers a token, subspace_rank for each cluster, and what is cast of the weights, in the model's
dtype; not the input. Beside the weights lie r leading directions of each, in the adapter's dtype.
Not modelled: use_dynamic_rank, embeddings, packed bases (PEFT fails on them); the importance that ASA keeps while it
prunes, two numbers for each that trains. Clusters are taken to be equally large: k-means decides by the weights'
values. A cluster of fewer rows than subspace_rank trains less, so this errs high.
Mirrors peft/tuners/adamss/layer.py Linear.forward and update_layer, peft 0.21.2. A bias counts as one more column of
the weight. The rows' places stay on the CPU and are copied in every forward.
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
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host
from peftplan.units import DType, ceil_div

HARMLESS = COMMON | {
    "svd_threshold", "random_seed", "init_weights", "use_asa", "asa_target_subspaces", "init_warmup", "final_warmup",
    "mask_interval", "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent",
}  # fmt: skip
PACKAGES = ("scikit-learn==1.9.1",)
"""Its k-means."""


@final
@dataclass(frozen=True)
class Adamss(OnLinears):
    """PEFT's AdamssConfig."""

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    use_dynamic_rank: bool = False
    title: ClassVar[str] = "AdaMSS"
    reads_weight: ClassVar[bool] = True
    no_4bit: ClassVar[str] = "PEFT gives its factors the packed weight's dtype, and integers cannot train"
    no_8bit: ClassVar[str] = no_4bit
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    def check(self) -> None:
        check_rank(self.r)
        for knob in ("num_subspaces", "subspace_rank"):
            if self.knob(knob) < 1:
                raise RequestError(f"method.{knob}={self.knob(knob)}: must be at least 1")
        if self.use_dynamic_rank:
            raise Unsupported(
                "method.use_dynamic_rank=true goes by the weights' values; leave it out for the most it takes"
            )

    def _projection(self, module: Module, host: Host) -> Tensor:
        """newB: the leading right singular vectors."""
        out, wide = module.weight.shape
        wide += bias_of(module) is not None
        rank = min(self.r, out, wide)
        if self.subspace_rank > rank:
            raise RequestError(
                f"method.subspace_rank={self.subspace_rank}: {module.path} has {rank} directions; lower it"
            )
        return Tensor("@adamss_newB", (rank, wide), host.new_dtype, BUFFER)

    def _clusters(self, out: int) -> list[int]:
        """Rows in each."""
        count = min(self.num_subspaces, out)
        return [ceil_div(out - i, count) for i in range(count)]

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        sizes = [self._projection(c.module, host).numel for c in chosen]
        places = Tensor("@adamss_index", (sum(c.module.out_features for c in chosen),), DType.int64, BUFFER)
        projection = Tensor("@adamss_newB", (sum(sizes),), host.new_dtype, BUFFER)
        return (projection, places) if host.numerics.backend == "cpu" else (projection,)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        projection = self._projection(module, host)
        with b.marked(module.site, "down"):
            x = b.cast(module.x, module.weight.dtype, label="adamss_x")
            given = x if bias_of(module) is None else _with_one(b, x)
        ahead, b.ops = tuple(b.ops), []
        with b.marked(module.site, "up"):
            down = b.linear(given, b.cast(projection, x.dtype, label="newB"), label="projected")
            joined, held = self._joined(b, down, module, host)
            change, places = _scattered(b, joined)
        with b.marked(module.site, "extra"):
            out = b.cast(b.add(base, change, label="sum"), module.x.dtype, label="out")
            b.hold(*held, places, down, change, given, x, module.x)
        inner = writing(writing(module.ops, module.x, x), module.out, base)
        return (*ahead, *inner, *ended(b, out, module, name=self.title))

    def _joined(self, b: Builder, down: Tensor, module: Module, host: Host) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The clusters' changes side by side, and the locals that outlive them."""
        clusters, dtype = self._clusters(module.out_features), down.dtype
        ranks = [min(rows, self.subspace_rank) for rows in clusters]
        firsts, seconds = (
            [
                b.weight(f"adamss_{name}.{i}", *shape, dtype=host.new_dtype, kind=ADAPTER)
                for i, shape in enumerate(shapes)
            ]
            for name, shapes in (
                ("A", [(rank, down.shape[-1]) for rank in ranks]),
                ("B", list(zip(clusters, ranks, strict=True))),
            )
        )
        b.hold(*firsts, *seconds)
        pair: tuple[Tensor, ...] = ()
        chunks: list[Tensor] = []
        for first, second in zip(firsts, seconds, strict=True):
            a = b.cast(first, dtype, label="A")
            b.hold(*pair[:1])
            up = b.cast(second, dtype, label="B")
            b.hold(*pair[1:])
            pair = (a, up)
            chunks.append(b.linear(b.linear(down, a, label="in_cluster"), up, label="of_rows"))
        joined = b.concat(tuple(chunks), *module.out.shape, label="chunks")
        return joined, (*chunks, *pair)


def _with_one(b: Builder, x: Tensor) -> Tensor:
    """The input with a one behind it, for the bias."""
    ones = b.plain("ones", *x.shape[:-1], 1, dtype=x.dtype)
    out = b.concat((x, ones), *x.shape[:-1], x.shape[-1] + 1, label="with_one")
    b.hold(ones)
    return out


def _scattered(b: Builder, joined: Tensor) -> tuple[Tensor, Tensor]:
    """The rows back in their order, and where they go, which is kept: on a GPU a copy."""
    places = Tensor("@adamss_index", joined.shape[-1:], DType.int64, BUFFER)
    if b.numerics.backend != "cpu":
        places = b.plain("places", *places.shape, dtype=places.dtype)
    zeros = b.plain("zeros", *joined.shape, dtype=joined.dtype)
    out = Tensor("", joined.shape, joined.dtype)
    grads = (Grad(joined, joined.logical_bytes),)
    return b.formula("scattered", out, zeros, joined, places, keeps=(places,), grads=grads), places


METHOD = Adamss
EXAMPLES = (Adamss(r=16), Adamss(r=5, num_subspaces=3, subspace_rank=2, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
