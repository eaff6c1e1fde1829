"""Trained keys and values in front of every layer's own: what prefix tuning and cartridges share.

Mirrors peft/peft_model.py get_prompt and peft/utils/other.py _prepare_prompt_learning_config, peft 0.21.2, and
transformers/cache_utils.py DynamicCache.__init__, transformers 5.23.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from peftplan.arch.core import Arch, Attention
from peftplan.errors import RequestError, Unsupported
from peftplan.graph.blocks.setup import Batch
from peftplan.graph.builder import Builder
from peftplan.graph.core import Graph, Region, Tensor
from peftplan.methods import _prompts
from peftplan.methods._saved import save_modules
from peftplan.methods.base import Family, Host, Method
from peftplan.units import DType

STATES_HEAD_DIM = ("llama", "mistral", "qwen3", "gemma")
"""Families whose config class writes head_dim (transformers 5.23, configuration_*.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """The shape of what a prompt encoder returns: (size, tokens, values)."""

    size: int
    tokens: int
    width: int
    """Of one layer's keys."""
    layers: int
    """Of the cache, which may have more than the model."""
    used: int
    """The model's layers."""

    @property
    def values(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.width * self.layers

    def shape(self, layers: int) -> tuple[int, int, int]:
        """Of the keys and values of so many layers."""
        return self.size, self.tokens, 2 * self.width * layers


@dataclass(frozen=True)
class Prefix(Method):
    """The knobs that PEFT's configs of both have, and how the cache comes before the model."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None
    modules_to_save: tuple[str, ...] | None = None
    family: ClassVar[Family] = "soft prompt"
    checkpoints: ClassVar[bool] = False

    @abstractmethod
    def encode(self, b: Builder, ids: Tensor, cache: Cache) -> Tensor:
        """The prompt encoder's forward, fp32."""

    def seen(self, batch: Batch) -> Batch:
        return _prompts.after_cache(batch, self.num_virtual_tokens)

    def apply(self, graph: Graph, host: Host) -> Graph:
        cache = self._cache(graph, host)
        first, *rest = graph.regions
        b = Builder(host.numerics)
        held = _prompts.long_mask(b, {t.name: t for t in graph.inputs}, cache.tokens)
        ids, buffers = _prompts.prompt_ids(b, cache.tokens, cache.size)
        values = b.cast(self.encode(b, ids, cache), _cache_dtype(rest), label="prefix")
        past = b.copy(values, *cache.shape(cache.used), label="past", grad_copied=True)
        spare = self._spare(b, values, cache)
        lasts = bool(rest[0].returned)  # the cache is part of what the model returns
        front = replace(
            first,
            ops=(*b.ops, *first.ops),
            returned=spare if lasts else (),
            held=held if lasts else (*held, *spare),
            handed=(past.name,),
        )
        prefixed = replace(graph, regions=(front, *rest), buffers=(*graph.buffers, *buffers))
        return save_modules(prefixed, self.modules_to_save)

    def _spare(self, b: Builder, values: Tensor, cache: Cache) -> tuple[str, ...]:
        """Keys and values for layers that the model does not have, which stay in the cache."""
        layers = cache.layers - cache.used
        made = [b.plain("spare", *cache.shape(layers), dtype=values.dtype, ins=(values,))] if layers else []
        return tuple(t.name for t in made)

    def _cache(self, graph: Graph, host: Host) -> Cache:
        arch = host.arch
        attention = arch.layers[0][0].attention
        width = attention.kv_heads * attention.head_dim
        if any(layer.attention.kv_heads * layer.attention.head_dim != width for layer, _ in arch.layers):
            raise Unsupported("a prefix of layers whose keys differ in width is not modelled; use prompt_tuning")
        self._check_heads(arch, attention)
        _prompts.check_shape(num_transformer_submodules=(self.num_transformer_submodules, 1))
        layers = arch.num_layers if self.num_layers is None else self.num_layers
        if layers < arch.num_layers:
            raise RequestError(
                f"method.num_layers={layers}: PEFT fails where the cache has fewer layers than the model, which has "
                f"{arch.num_layers}; leave it out"
            )
        return Cache(
            size=graph.regions[0].exit.shape[0],
            tokens=_prompts.checked_tokens(self.num_virtual_tokens),
            width=width,
            layers=layers,
            used=arch.num_layers,
        )

    def _check_heads(self, arch: Arch, attention: Attention) -> None:
        """PEFT overwrites both knobs, from the config's head_dim if it has one, from their quotient otherwise."""
        if arch.family in STATES_HEAD_DIM or arch.model_dump().get("head_dim") is not None:
            return
        width, heads = self.token_dim or arch.hidden, self.num_attention_heads or attention.heads
        if width // heads != attention.head_dim:
            raise RequestError(
                f"method.token_dim={self.token_dim}, num_attention_heads={self.num_attention_heads}: PEFT takes "
                f"their quotient for head_dim, which is {attention.head_dim} here; leave them out"
            )


def _cache_dtype(regions: list[Region]) -> DType:
    """What the layers expect: the model's dtype, that of its first weight."""
    return next(t.dtype for region in regions for t in region.taken)
