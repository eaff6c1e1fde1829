"""What LoHa and LoKr share: a change of the weight, made anew in each forward, as a second linear layer.

Mirrors peft/tuners/lycoris_utils.py and the forward of peft/tuners/loha/layer.py and lokr/layer.py, peft 0.21.2.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from peftplan.graph.builder import Builder
from peftplan.graph.core import Grad, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import OnLinears, builder, by_pattern, check_rank, check_share
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"alpha", "alpha_pattern", "init_weights", "use_effective_conv2d"}


@dataclass(frozen=True)
class Lycoris(OnLinears):
    """`base(x) + linear(x, delta)` in place of each chosen layer."""

    r: int = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    returns_input: ClassVar[bool] = True

    def check(self) -> None:
        check_rank(self.r)
        check_share("rank_dropout", self.rank_dropout)
        check_share("module_dropout", self.module_dropout)

    def size(self, path: str) -> int:
        return by_pattern(path, self.r, self.rank_pattern)

    @abstractmethod
    def delta(self, b: Builder, module: Module, rank: int, dtype: DType) -> Tensor:
        """Writes the change of a module's weight for a rank: (out, in)."""

    def _dropped(self, b: Builder, weight: Tensor) -> Tensor:
        """Some of its rows set to 0, in place: keeps one number a row."""
        rows = weight.shape[0]
        drawn = b.plain("rank_drawn", rows, dtype=DType.float32)
        kept = b.plain("rank_kept", rows, dtype=DType.boolean, ins=(drawn,))
        drop = b.plain("rank_drop", rows, dtype=self.drop_dtype(weight), ins=(kept,))
        out = weight._replace(base=weight.storage)
        out = b.formula("rank_dropped", out, weight, keeps=(drop,), grads=(Grad(weight, weight.logical_bytes),))
        b.hold(drop)
        return out

    def drop_dtype(self, weight: Tensor) -> DType:
        """What the rows' factors are held in."""
        return weight.dtype

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        b, base = builder(module, host)
        with b.marked(module.site, "down"):
            weight = self.delta(b, module, size, host.new_dtype)
            weight = self._dropped(b, weight) if self.rank_dropout else weight
            x = b.cast(module.x, weight.dtype, label="adapter_x")
            change = b.linear(x, weight, label="delta_out")
            b.hold(x, weight)
        with b.marked(module.site, "extra"):
            out = b.cast(b.add(base, change, label="sum"), module.x.dtype, label="out")
            b.hold(module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))
