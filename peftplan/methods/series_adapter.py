"""LLM-Adapters' series adapter: a bottleneck before the feed-forward's first linear layers and behind its last, on a
residual of its own (Hu 2023, arXiv:2304.01933, section 3; AdapterH and AdapterP in its code).

Trains: 2 x bottleneck_size x hidden size per adapted linear layer.
Keeps for backward: its own input in fp32, what the activation keeps, and a mask where there is dropout.
Not modelled: packed bases; a learned scaling.
Its code knows one model family by these names, Llama; others that have them are taken alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from peftplan.graph.builder import Builder
from peftplan.graph.core import Op
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import builder
from peftplan.methods._linears import ended
from peftplan.methods._llm_adapters import HARMLESS, Bottleneck, check_places
from peftplan.methods.base import Host

__all__ = ["EXAMPLES", "HARMLESS", "METHOD", "UNVERIFIED"]
PLACES = ("gate_proj", "up_proj", "down_proj")
"""TRANSFORMERS_MODELS_TO_ADAPTER_TYPE_MAPPING: on the last one the bottleneck comes behind, on the others before."""
BEHIND = PLACES[-1]
VARIANTS: dict[str, dict[str, Any]] = {"adapter_h": {}, "adapter_p": {"target_modules": (BEHIND,)}}


@final
@dataclass(frozen=True)
class SeriesAdapter(Bottleneck):
    title: ClassVar[str] = "series adapters"

    def default_targets(self, family: str) -> tuple[str, ...]:
        del family
        return PLACES

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        if check_places(module.path, PLACES, self.title) == BEHIND:
            return self._behind(module, host)
        return self._before(module, host)

    def _before(self, module: Module, host: Host) -> tuple[Op, ...]:
        b = Builder(host.numerics, f"{module.path}.")
        x = module.x
        with b.marked(module.site, "down"):
            out, wide = self.through(b, x, x, host)
            given = b.add(out, x, label="adapter_sum")
            ahead, b.ops = tuple(b.ops), []
        with b.marked(module.site, "extra"):
            b.hold(given, wide, x)
        return (*ahead, *writing(module.ops, x, given), *b.ops)

    def _behind(self, module: Module, host: Host) -> tuple[Op, ...]:
        b, base = builder(module, host)
        with b.marked(module.site, "down"):
            out, wide = self.through(b, base, base, host)
        with b.marked(module.site, "extra"):
            result = b.add(out, base, label="adapter_sum")
            b.hold(base, out, wide, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, result, module, name=self.title))


METHOD = SeriesAdapter
EXAMPLES = (SeriesAdapter(bottleneck_size=8), SeriesAdapter(bottleneck_size=5, non_linearity="gelu",
            adapter_dropout=0.1, target_modules=("down_proj",)))  # fmt: skip
UNVERIFIED: dict[str, str] = {"models with a fused feed-forward": "refused where no place of it has the names above"}
