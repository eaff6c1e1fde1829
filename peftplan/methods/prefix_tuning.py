"""Prefix tuning: trained keys and values in front of every layer's own (Li 2021, arXiv:2101.00190, section 4).

Trains: num_virtual_tokens x layers x 2 x (key-value heads x head_dim); with prefix_projection an embedding of the
key-value width and a two-layer network instead.
Keeps for backward: keys and values longer by the virtual tokens, with every query head's copy of them where heads
share; a mask, which attention then needs, and which rules out its fastest kernel.
Not modelled: packed batches; layers whose keys differ in width. PEFT cannot run it with gradient checkpointing.
Mirrors peft/tuners/prefix_tuning/model.py PrefixEncoder, peft/peft_model.py get_prompt, peft 0.21.2, and
transformers/cache_utils.py DynamicCache.__init__, transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from peftplan.errors import Unsupported
from peftplan.graph.blocks.decoder import Batch
from peftplan.graph.builder import Builder
from peftplan.graph.core import Graph, Region, Tensor
from peftplan.methods import _prompts
from peftplan.methods.base import Family, Host, Method
from peftplan.units import DType

HARMLESS = _prompts.HARMLESS | {"init_weights"}


@final
@dataclass(frozen=True)
class PrefixTuning(Method):
    """PEFT's PrefixTuningConfig, the knobs that change memory."""

    num_virtual_tokens: int | None = None
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None
    family: ClassVar[Family] = "soft prompt"
    checkpoints: ClassVar[bool] = False

    def seen(self, batch: Batch) -> Batch:
        return _prompts.after_cache(batch, self.num_virtual_tokens)

    def apply(self, graph: Graph, host: Host) -> Graph:
        attention = host.arch.layers[0][0].attention
        width = attention.kv_heads * attention.head_dim
        if any(layer.attention.kv_heads * layer.attention.head_dim != width for layer, _ in host.arch.layers):
            raise Unsupported("method prefix_tuning on layers whose keys differ in width is not modelled")
        _prompts.check_shape(
            token_dim=(self.token_dim, host.arch.hidden, width),
            num_layers=(self.num_layers, host.arch.num_layers),
            num_attention_heads=(self.num_attention_heads, attention.heads, attention.kv_heads),
            num_transformer_submodules=(self.num_transformer_submodules, 1),
        )
        return self._cached(graph, host, width)

    def _cached(self, graph: Graph, host: Host, width: int) -> Graph:
        first, *rest = graph.regions
        tokens = _prompts.checked_tokens(self.num_virtual_tokens)
        b = Builder(host.numerics)
        inputs = {t.name: t for t in graph.inputs}
        held = _prompts.long_mask(b, inputs, tokens)
        size = first.exit.shape[0]
        ids, buffers = _prompts.prompt_ids(b, tokens, size)
        values = self._encoded(b, ids, tokens, width, 2 * width * host.arch.num_layers, size)
        past = b.copy(b.cast(values, _cache_dtype(rest), label="prefix"), label="past", grad_copied=True)
        front = replace(first, ops=(*b.ops, *first.ops), held=held, handed=(past.name,))
        return replace(graph, regions=(front, *rest), buffers=(*graph.buffers, *buffers))

    def _encoded(self, b: Builder, ids: Tensor, tokens: int, width: int, values: int, size: int) -> Tensor:
        """PrefixEncoder.forward."""
        if not self.prefix_projection:
            return _prompts.lookup(b, ids, tokens, values, copies=size)
        inner = self.encoder_hidden_size or width
        x = _prompts.lookup(b, ids, tokens, width, copies=size)
        h = b.squash(_prompts.linear(b, x, inner, "transform.0"), label="tanh")
        return _prompts.linear(b, h, values, "transform.2")


def _cache_dtype(regions: list[Region]) -> DType:
    """What the layers expect: the model's dtype, that of its first weight."""
    return next(t.dtype for region in regions for t in region.taken)


METHOD = PrefixTuning
EXAMPLES = (PrefixTuning(num_virtual_tokens=20), PrefixTuning(num_virtual_tokens=5, prefix_projection=True))
UNVERIFIED: dict[str, str] = {}
