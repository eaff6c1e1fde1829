"""Several LoRA adapters of one shape on a model: some run, some of those train, the rest lies beside them.

Mirrors peft 0.21.2: PeftModel.add_adapter, BaseTunerLayer.set_adapter and set_requires_grad, BaseTuner
_check_new_adapter_config, and ModulesToSaveWrapper.check_set_adapter, whose refusals these are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftplan.errors import RequestError
from peftplan.graph.core import ADAPTER, Graph, Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """How many adapters are loaded, run, and train."""

    loaded: int
    active: int
    trained: int

    def check(self, *, bias: str, saved: bool) -> None:
        """Raises RequestError for counts that cannot be, and for what PEFT refuses with several."""
        order = {"adapters": self.loaded, "active_adapters": self.active, "trained_adapters": self.trained}
        if not 1 <= self.trained <= self.active <= self.loaded:
            said = ", ".join(f"{name}={count}" for name, count in order.items())
            raise RequestError(f"method.{said}: train at least 1, of those that are active, of those that are loaded")
        if self.loaded > 1 and bias != "none":
            raise RequestError(f"method.bias={bias}: PEFT has several adapters without biases only; set bias to none")
        if self.active > 1 and saved:
            raise RequestError(
                "method.active_adapters: PEFT has one active adapter where there are modules_to_save or "
                "trainable_token_indices; set it to 1"
            )

    def beside(self, graph: Graph) -> Graph:
        """The graph with the weights of the adapters that do not run, given those of the first that does."""
        if self.loaded == 1:
            return graph
        idle = self.loaded - self.active
        firsts = [(t, n) for t, n in graph.params() if t.kind == ADAPTER and not _further(t)]
        tokens = tuple(t for t in graph.buffers if "trainable_tokens" in t.name for _ in range(idle))
        unused = tuple(t._replace(trainable=False) for t, n in firsts for _ in range(n * idle))
        return replace(graph, unused=(*graph.unused, *unused), buffers=(*graph.buffers, *tokens))


def _further(t: Tensor) -> bool:
    """Whether it is of an active adapter but the first: its name ends in a number."""
    return t.name.rsplit(".", 1)[-1].isdecimal()
