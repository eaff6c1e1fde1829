"""TinyLoRA: u trained numbers make a matrix inside each weight's frozen decomposition (arXiv:2602.04118).

Trains: u per adapted linear layer, or per group of them that `weight_tying` makes; plus `bias` and copies of
`modules_to_save`.
Keeps for backward: r numbers a token, and the r x r matrix. Beside the weights lie r (in + out) + u r^2 frozen numbers
per layer.
Not modelled: embeddings, packed bases (PEFT fails on them).
Mirrors peft/tuners/tinylora/layer.py Linear.forward and _compute_R, peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, builder, check_rank, check_share, in_order
from peftplan.methods._linears import COMMON, Plan, ended
from peftplan.methods.base import Host
from peftplan.methods.targets import Targets

HARMLESS = COMMON | {"projection_seed", "save_projection", "init_v_bound", "init_weights"}


@final
@dataclass(frozen=True)
class Tinylora(OnLinears):
    """PEFT's TinyLoraConfig."""

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    tinylora_dropout: float = 0.0
    bias: Literal["none", "all", "tinylora_only"] = "none"
    title: ClassVar[str] = "TinyLoRA"
    reads_weight: ClassVar[bool] = True
    returns_input: ClassVar[bool] = True
    no_4bit: ClassVar[str] = "PEFT decomposes the weight and puts it back, and integers cannot be parameters that train"
    no_8bit: ClassVar[str] = no_4bit
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_rank(self.r)
        check_share("tinylora_dropout", self.tinylora_dropout)
        if self.u < 1:
            raise RequestError(f"method.u={self.u}: must be at least 1")
        if not 0 <= self.weight_tying <= 1:
            raise RequestError(f"method.weight_tying={self.weight_tying}: must be 0 to 1")

    def plan(self, graph: Graph, choice: Targets) -> Plan[int]:
        """The number of the group that each module shares its numbers with; 0 where it has its own."""
        planned = super().plan(graph, choice)
        if not self.weight_tying:
            return planned
        found = list(in_order(graph, planned))
        groups = max(1, round(len(found) * (1 - self.weight_tying)))
        size = max(1, len(found) // groups)
        numbered: dict[int | str, dict[str, int]] = {key: {} for key in planned}
        for i, (key, module) in enumerate(found):
            numbered[key][module.path] = min(i // size, groups - 1) + 1
        return numbered

    def _frozen(self, wide: int, out: int, host: Host) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and P."""
        shapes = {"A": (self.r, wide), "B": (out, self.r), "P": (self.u, self.r, self.r)}
        a, b, p = (Tensor(f"@tinylora_{n}", shape, host.new_dtype, BUFFER) for n, shape in shapes.items())
        return a, b, p

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        wide, out = (sum(c.module.weight.shape[i] for c in chosen) for i in (1, 0))
        a, b, p = self._frozen(wide, out, host)
        return a, b, p._replace(shape=(len(chosen) * self.u, self.r, self.r))

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        b, base = builder(module, host)
        a, up, p = self._frozen(module.in_features, module.out_features, host)
        with b.marked(module.site, "down"):
            matrix = self._matrix(b, p, host, size)
            dropped = b.dropout(module.x, self.tinylora_dropout)
            x = b.cast(dropped, host.new_dtype, label="tinylora_x")
            down = b.linear(b.linear(x, a, label="tinylora_A"), matrix, label="tinylora_R")
        with b.marked(module.site, "up"):
            change = b.linear(down, up, label="tinylora_B")
        with b.marked(module.site, "extra"):
            out = b.cast(b.add(base, change, label="sum"), module.x.dtype, label="out")
            b.hold(matrix, x, down, change, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))

    def _matrix(self, b: Builder, p: Tensor, host: Host, group: int) -> Tensor:
        """R = sum of v_i P_i."""
        v = b.weight("tinylora_v", self.u, dtype=host.new_dtype, kind=ADAPTER)
        v = v._replace(name=f"@tinylora_v.{group}") if group else v
        size = self.r * self.r
        row = b.matmul(v.view(1, self.u), p.view(self.u, size), 1, size, inner=self.u, label="R")
        return row.view(self.r, self.r)


METHOD = Tinylora
EXAMPLES = (Tinylora(), Tinylora(r=3, u=5, target_modules="all-linear", tinylora_dropout=0.1))
UNVERIFIED: dict[str, str] = {}
