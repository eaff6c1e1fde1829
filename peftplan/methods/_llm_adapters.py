"""LLM-Adapters' bottlenecks (Hu 2023, arXiv:2304.01933): two small linear layers with an activation between them, put
on linear layers one by one.

Mirrors AGI-Edgerunners/LLM-Adapters, peft/src/peft/tuners/bottleneck.py (2023-11): fp32 whatever the base is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Tensor
from peftplan.methods._activations import active, check_activation
from peftplan.methods._branches import OnLinears, check_rank, check_share
from peftplan.methods._linears import COMMON
from peftplan.methods.base import Family, Host
from peftplan.units import DType

HARMLESS = COMMON | {"init_weights"}


@dataclass(frozen=True)
class Bottleneck(OnLinears):
    """BottleneckConfig, less the switch between its kinds, which are methods here."""

    family: ClassVar[Family] = "additive"
    libraries: ClassVar[tuple[str, ...]] = ("LLM-Adapters",)
    no_4bit: ClassVar[str] = "LLM-Adapters has them on 8-bit weights only"
    no_8bit: ClassVar[str] = "not modelled"

    bottleneck_size: int = 256
    non_linearity: str = "tanh"
    adapter_dropout: float = 0.0
    scaling: float = 1.0

    def check(self) -> None:
        check_rank(self.bottleneck_size, "method.bottleneck_size")
        check_share("adapter_dropout", self.adapter_dropout)
        check_activation("non_linearity", self.non_linearity)

    def through(self, b: Builder, x: Tensor, like: Tensor, host: Host) -> tuple[Tensor, Tensor]:
        """`up(act(down(dropout(x.float())))).to(like.dtype) * scaling`, as wide as `like`, and x in fp32, a local that
        lives as long as the forward."""
        if host.adapter_dtype not in (None, DType.float32):
            raise Unsupported(f"{self.title} are fp32 whatever the base is; leave --adapter-dtype out")
        size = self.bottleneck_size
        down = b.weight("adapter_down.weight", size, x.shape[-1], dtype=DType.float32, kind=ADAPTER)
        up = b.weight("adapter_up.weight", like.shape[-1], size, dtype=DType.float32, kind=ADAPTER)
        wide = b.cast(x, DType.float32, label="adapter_x")
        h = b.linear(b.dropout(wide, self.adapter_dropout), down, label="adapter_down")
        h = b.linear(active(b, h, self.non_linearity), up, label="adapter_up")
        return b.scale(b.cast(h, like.dtype, label="adapter_cast"), label="adapter_out"), wide


def check_places(path: str, known: tuple[str, ...], title: str) -> str:
    """The module's own name. Raises RequestError where it is none of `known`."""
    name = path.rsplit(".", 1)[-1]
    if name not in known:
        raise RequestError(f"--target-modules {name}: {title} go on {', '.join(known)}; name some of them")
    return name
