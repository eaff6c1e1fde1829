"""BAdam: full fine-tuning a block at a time; a block is a decoder layer (Luo 2024, arXiv:2404.02827, algorithm 1).

Trains: every weight of one layer, then of the next; the embedding and what follows the layers where they are included.
Keeps for backward: as full fine-tuning, in the block; layers above it keep what passes gradients on, those below
nothing. So of equal layers the lowest is the worst.
States: an fp32 copy of the block, which the optimizer steps over, and its states; both go when the block changes. At
the step each gradient becomes an fp32 one.
Not modelled: `ratio` (sparse gradients); BAdam on LoRA.
Mirrors badam 1.4, block_optim.py BlockOptimizer, with one GPU; LLaMA-Factory's settings without their `badam_`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.arch.core import Arch
from peftplan.errors import RequestError, Unsupported
from peftplan.graph.core import Graph
from peftplan.methods._layers import train_layers
from peftplan.methods.base import Family, Host, Method, Trains
from peftplan.units import DType

HARMLESS = frozenset({"switch_interval", "update_ratio", "mask_mode", "verbose"})
EMBEDDING, REST = "the embedding", "the last norm and the head"


@final
@dataclass(frozen=True)
class Badam(Method):
    family: ClassVar[Family] = "memory-frugal"
    libraries: ClassVar[tuple[str, ...]] = ("badam", "LLaMA-Factory")
    trains: ClassVar[Trains] = "base"

    mode: Literal["layer", "ratio"] = "layer"
    switch_mode: Literal["ascending", "descending", "random", "fixed"] = "ascending"
    start_block: int | None = None
    include_embedding: bool = False
    include_lm_head: bool = False
    """Whether all that is in no other block is one."""
    masters: ClassVar[DType | None] = DType.float32
    empties_cache: ClassVar[bool] = True

    def stages(self, arch: Arch) -> tuple[Method, ...]:
        if self.mode == "ratio":
            raise Unsupported("method.mode=ratio: BAdam's sparse gradients are not modelled; use layer")
        blocks = list(self._blocks(arch))
        start = self.start_block
        if start is not None and not 0 <= start < len(blocks):
            raise RequestError(f"method.start_block={start}: the model has {len(blocks)} blocks; use 0 to "
                               f"{len(blocks) - 1}")  # fmt: skip
        if self.switch_mode == "fixed":
            if start is None:
                raise RequestError("method.switch_mode=fixed needs a block to stay at; set method.start_block")
            return (blocks[start],)
        ends = {i for first, count in _runs(arch) for i in (first, first + count - 1)}
        return tuple(block for block in blocks if block.layer is None or block.layer in ends)

    def _blocks(self, arch: Arch) -> Iterator[_Block]:
        """BlockOptimizer.infer_param_groups; the embedding is part of the rest where it is no block of its own."""
        if self.include_embedding:
            yield _Block(None, (EMBEDDING,))
        yield from (_Block(i, ()) for i in range(arch.num_layers))
        if self.include_lm_head:
            yield _Block(None, (REST,) if self.include_embedding else (EMBEDDING, REST))

    def apply(self, graph: Graph, host: Host) -> Graph:
        return self.stages(host.arch)[0].apply(graph, host)


def _runs(arch: Arch) -> Iterator[tuple[int, int]]:
    """(first layer, how many) of every run of equal layers."""
    first = 0
    for _, count in arch.layers:
        yield first, count
        first += count


@final
@dataclass(frozen=True)
class _Block(Method):
    """The stage in which one layer trains, or what lies outside of the layers."""

    layer: int | None
    outside: tuple[str, ...]
    masters: ClassVar[DType | None] = DType.float32
    empties_cache: ClassVar[bool] = True

    @property
    def stage(self) -> str:
        return f"layer {self.layer}" if self.layer is not None else " and ".join(self.outside)

    def apply(self, graph: Graph, host: Host) -> Graph:
        del host
        return train_layers(
            graph,
            lambda i: i == self.layer,
            lambda weight: (EMBEDDING if "embed_tokens" in weight.name else REST) in self.outside,
            method="badam",
        )


METHOD = Badam
EXAMPLES = (Badam(), Badam(switch_mode="fixed", start_block=1, include_embedding=True))
UNVERIFIED: dict[str, str] = {}
