"""Parameters of a model, from its Arch alone (a second opinion on what the graph counts)."""

from __future__ import annotations

from peftplan.arch.core import Arch, Attention, Experts, Latent, Layer, Mlp


def parameter_count(arch: Arch) -> int:
    """Parameters of the causal language model, a tied head counted once."""
    layers = sum(_layer(layer, hidden=arch.hidden) * count for layer, count in arch.layers)
    head = 0 if arch.tied else arch.vocab * arch.hidden
    return arch.vocab * arch.hidden + layers + arch.hidden + head + arch.vocab * arch.head_bias


def _layer(layer: Layer, *, hidden: int) -> int:
    norms = 2 * hidden
    return norms + _attention(layer.attention, hidden=hidden) + _mlp(layer.mlp, hidden=hidden)


def _attention(attention: Attention, *, hidden: int) -> int:
    if attention.latent is not None:
        return _latent(attention, attention.latent, hidden=hidden)
    queries = attention.heads * attention.head_dim
    qkv = queries + 2 * attention.kv_heads * attention.head_dim
    biases = qkv * attention.qkv_bias + hidden * attention.out_bias
    return hidden * (qkv + queries) + biases + 2 * attention.head_dim * attention.qk_norm


def _latent(attention: Attention, latent: Latent, *, hidden: int) -> int:
    heads, narrow = attention.heads, latent.rank + latent.rope_dim
    if latent.query_rank is None:
        queries = hidden * heads * attention.head_dim
    else:
        queries = latent.query_rank * (hidden + 1 + attention.qkv_bias + heads * attention.head_dim)
    expanded = heads * (attention.head_dim - latent.rope_dim + latent.value_dim)
    keys = narrow * (hidden + attention.qkv_bias) + latent.rank * (1 + expanded)
    return queries + keys + hidden * (heads * latent.value_dim + attention.out_bias)


def _mlp(mlp: Mlp | Experts, *, hidden: int) -> int:
    if isinstance(mlp, Experts):
        return _experts(mlp, hidden=hidden)
    return 3 * hidden * mlp.size + (2 * mlp.size + hidden) * mlp.bias


def _experts(experts: Experts, *, hidden: int) -> int:
    router = experts.number * hidden
    shared = 3 * hidden * (experts.shared_size or 0) + hidden * experts.shared_gate
    return router + 3 * hidden * experts.size * experts.number + shared
