"""BEFT: a new trained bias on every chosen linear layer (Huang 2025, arXiv:2509.15974).

Trains: out per adapted linear layer; plus copies of `modules_to_save`.
Keeps for backward: nothing.
Not modelled: embeddings.
Mirrors peft/tuners/beft/layer.py Linear.forward, peft 0.21.2; default targets from peft/utils/constants.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.graph.core import ADAPTER, Op
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import OnLinears, builder
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Family, Host
from peftplan.methods.targets import DEFAULTS

HARMLESS = COMMON | {"init_weights"}


@final
@dataclass(frozen=True)
class Beft(OnLinears):
    """PEFT's BeftConfig."""

    family: ClassVar[Family] = "selective"
    title: ClassVar[str] = "BEFT"
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform")
    defaults: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(DEFAULTS, ("v_proj",))

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        with b.marked(module.site, "extra"):
            bias = b.weight("beft_bias", module.out_features, 1, dtype=host.new_dtype, kind=ADAPTER)
            total = b.add(base, bias.view(module.out_features), label="sum")
            out = b.cast(total, base.dtype, label="out")
            b.hold(*((base, total) if out is not total else ()), module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))


METHOD = Beft
EXAMPLES = (Beft(), Beft(target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
