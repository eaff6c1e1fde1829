"""LLM-Adapters' parallel adapter: a bottleneck beside each chosen linear layer, added to its output (Hu 2023,
arXiv:2304.01933, section 3).

Trains: bottleneck_size x (in + out) per adapted linear layer.
Keeps for backward: the layer's input in fp32, what the activation keeps, and a mask where there is dropout.
Not modelled: packed bases; a learned scaling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.graph.core import Op
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import builder
from peftplan.methods._linears import ended
from peftplan.methods._llm_adapters import HARMLESS, Bottleneck
from peftplan.methods.base import Host

__all__ = ["EXAMPLES", "HARMLESS", "METHOD", "UNVERIFIED"]


@final
@dataclass(frozen=True)
class LlmAdaptersParallel(Bottleneck):
    title: ClassVar[str] = "parallel adapters"

    def default_targets(self, family: str) -> tuple[str, ...]:
        """TRANSFORMERS_MODELS_TO_PARALLEL_TARGET_MODULES_MAPPING: the same for all of Llama's kind."""
        del family
        return ("q_proj", "v_proj", "k_proj")

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        with b.marked(module.site, "down"):
            out, wide = self.through(b, module.x, base, host)
        with b.marked(module.site, "extra"):
            result = b.add(base, out, label="adapter_sum")
            b.hold(out, wide, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, result, module, name=self.title))


METHOD = LlmAdaptersParallel
EXAMPLES = (LlmAdaptersParallel(bottleneck_size=8, target_modules=("v_proj", "down_proj")),
            LlmAdaptersParallel(bottleneck_size=5, non_linearity="relu", adapter_dropout=0.1,
                                target_modules="all-linear"))  # fmt: skip
UNVERIFIED: dict[str, str] = {}
