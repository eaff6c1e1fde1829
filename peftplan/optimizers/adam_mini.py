"""Adam-mini (Zhang 2024, arXiv:2406.16793) as adam-mini 1.1.1 runs it: one momentum, one second moment per block.

Mirrors adam_mini/adam_mini.py: a block is a head of queries and keys, an output neuron of every other matrix, the whole
of a norm; biases keep AdamW's two states. All of the weight's own dtype. The step makes the squared gradient, then the
update and its negative, of one weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from peftplan.optimizers.base import Locals, Optimizer, State, Trained
from peftplan.units import ceil_div

VARIANTS: dict[str, dict[str, Any]] = {}
HARMLESS = frozenset({"n_kv_heads", "model_sharding", "verbose"})
_PER_HEAD = ("k_proj", "q_proj", "wq", "wk", "query", "key")
_PER_NEURON = (
    "embed", "embd", "wte", "lm_head", "output", "final_layer", "v_proj", "wv", "value", "o_proj", "wo", "attn.proj",
    "feed_forward", "linear", "mlp",
)  # fmt: skip


@final
@dataclass(frozen=True)
class AdamMini(Optimizer):
    dim: int = 2048
    """The model's width, which tells a head's size."""
    n_heads: int = 32

    def states(self, weights: Sequence[Trained], backend: str) -> Iterator[State]:
        del backend
        for w in weights:
            yield State(w.bytes, w.copies)
            yield State(w.dtype.size * self._blocks(w), w.copies)

    def _blocks(self, w: Trained) -> int:
        if "bias" in w.name:
            return w.numel
        if _any(_PER_HEAD, w):
            return ceil_div(w.numel, self.dim * self.dim // self.n_heads)
        return w.shape[0] if _any(_PER_NEURON, w) else 1

    def update(self, local: Locals, w: Trained, backend: str) -> None:
        del backend
        per_block = w.dtype.size * self._blocks(w)
        if "bias" in w.name:
            local.bind("h", w.bytes, beside=w.bytes)
            return
        local.bind("tmp_lr", per_block, beside=w.bytes)
        local.bind("h", per_block, beside=per_block)
        local.bind("stepsize", per_block, beside=per_block)
        local.bind("update", w.bytes)
        local.touch(w.bytes)


def _any(words: Sequence[str], w: Trained) -> bool:
    return any(word in w.name for word in words)


OPTIMIZER = AdamMini
EXAMPLES = (AdamMini(), AdamMini(dim=4096))
UNVERIFIED: dict[str, str] = {}
