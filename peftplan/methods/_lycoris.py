"""What LoHa and LoKr share: a change of the weight, made anew in each forward, as a second linear layer.

Mirrors peft/tuners/lycoris_utils.py and the forward of peft/tuners/loha/layer.py and lokr/layer.py, peft 0.21.2.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from peftplan.errors import Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import OnLinears, builder, by_pattern, check_rank
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

    def check(self) -> None:
        check_rank(self.r)
        for name in ("rank_dropout", "module_dropout"):
            if value := getattr(self, name):
                raise Unsupported(f"method.{name}={value} is not modelled yet; leave it out")

    def size(self, path: str) -> int:
        return by_pattern(path, self.r, self.rank_pattern)

    @abstractmethod
    def delta(self, b: Builder, module: Module, rank: int, dtype: DType) -> Tensor:
        """Writes the change of a module's weight for a rank: (out, in)."""

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        b, base = builder(module, host)
        with b.marked(module.site, "down"):
            weight = self.delta(b, module, size, host.new_dtype)
            x = b.cast(module.x, weight.dtype, label="adapter_x")
            change = b.linear(x, weight, label="delta_out")
            b.hold(x, weight)
        with b.marked(module.site, "extra"):
            out = b.cast(b.add(base, change, label="sum"), module.x.dtype, label="out")
            b.hold(module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))
