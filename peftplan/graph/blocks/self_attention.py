"""The attention half of a layer around its kernel: projections, per-head norms, rotary embedding."""

from __future__ import annotations

from dataclasses import replace

from peftplan.arch.core import Arch, Attention
from peftplan.graph.blocks.attention import Site, attend
from peftplan.graph.blocks.modules import project, rms_norm
from peftplan.graph.blocks.setup import Batch, Setup, Shared
from peftplan.graph.builder import Builder
from peftplan.graph.core import Tensor
from peftplan.graph.mesh import Mesh
from peftplan.units import DType

FP32 = DType.float32


def self_attention(
    b: Builder, arch: Arch, a: Attention, setup: Setup, shared: Shared, h: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """LlamaAttention.forward: projections, per-head norms (Qwen3), rotary embedding, attention, output projection.

    Returns the output and, from eager attention, the attention weights: a local of the layer until it returns.
    """
    types, batch = setup.types, setup.batch
    a = of_rank(a, setup.mesh)
    q_width, kv_width = a.heads * a.head_dim, a.kv_heads * a.head_dim
    eager = setup.attention == "eager"  # its products give gradients head by head

    def split(t: Tensor, heads: int, *, copied: bool = not setup.kernels.in_place) -> Tensor:
        return _heads(b, t, batch, heads, a.head_dim, copied=copied)

    fused: tuple[Tensor, ...] = ()
    if a.fused_qkv:
        qkv = project(b, h, q_width + 2 * kv_width, label="qkv_proj", site="qkv", types=types, biased=a.qkv_bias)
        q, k, v = (
            b.slice(qkv, batch.size, batch.seq, w, label=n)
            for n, w in (("query", q_width), ("key", kv_width), ("value", kv_width))
        )
        q, k, v = split(q, a.heads), split(k, a.kv_heads), split(v, a.kv_heads, copied=eager)
        fused = (qkv,)
    else:
        q = project(b, h, q_width, label="q_proj", site="q", types=types, biased=a.qkv_bias)
        q = split(_head_norm(b, arch, a, setup, q, a.heads, "q_norm"), a.heads)
        k = project(b, h, kv_width, label="k_proj", site="k", types=types, biased=a.qkv_bias)
        k = split(_head_norm(b, arch, a, setup, k, a.kv_heads, "k_norm"), a.kv_heads)
        v = project(b, h, kv_width, label="v_proj", site="v", types=types, biased=a.qkv_bias)
        v = split(v, a.kv_heads, copied=eager)
    mask = shared.window_mask if a.window is not None else shared.mask
    if setup.modeling.copies_heads:
        views = q, k, v
        q, k, v = (b.copy(t, label=n) for t, n in ((q, "q_heads"), (k, "k_heads"), (v, "v_heads")))
        b.hold(*views)
    if a.rotary_dim is not None:
        by_head = eager, eager or _repeats(a, setup, mask)
        q, k = setup.kernels.rotate(b, a, q, k, (shared.cos, shared.sin), by_head=by_head)
    site = Site(
        attention=a,
        size=batch.size,
        seq=batch.seq,
        implementation=setup.attention,
        documents=batch.documents,
        padded=batch.masked,
        use_cache=setup.caches,
        by_head=(a.rotary_concat and not setup.kernels.in_place) or setup.modeling.copies_heads,
        values_by_head=setup.modeling.copies_heads,
        past=batch.past,
        past_dtype=types.embedding,
        prefix=batch.prefix,
        prefix_dtype=_prefix_dtype(setup),
        half=types.linear,
        groups=batch.groups,
        repeats_always=setup.kernels.repeat_kv,
    )
    out, weights = attend(b, site, q, k, v, mask)
    y = project(b, out, arch.hidden, label="o_proj", site="o", types=types, biased=a.out_bias)
    rebound = () if setup.caches else (k, v)  # the cache hands back keys and values of its own
    b.hold(*fused, q, *rebound, out)
    return y, weights


def of_rank(a: Attention, mesh: Mesh) -> Attention:
    """The heads that one rank has."""
    if mesh.tp == 1:
        return a
    return replace(a, heads=a.heads // mesh.tp, kv_heads=a.kv_heads // mesh.tp)


def _repeats(a: Attention, setup: Setup, mask: Tensor | None) -> bool:
    """Whether keys are repeated for the queries that share them."""
    return a.heads > a.kv_heads and setup.attention.startswith("sdpa") and mask is not None


def _prefix_dtype(setup: Setup) -> DType:
    """What autocast computes; the weights themselves are float32 under it."""
    if setup.numerics.autocast is None:
        return setup.types.embedding
    return setup.numerics.autocast if setup.batch.prefix_computed else FP32


def _head_norm(b: Builder, arch: Arch, a: Attention, setup: Setup, t: Tensor, heads: int, label: str) -> Tensor:
    """Qwen3's q_norm and k_norm over head_dim."""
    if not a.qk_norm:
        return t
    out = rms_norm(b, arch, setup, t.view(setup.batch.size, setup.batch.seq, heads, a.head_dim), label)
    b.hold(t)
    return out


def _heads(b: Builder, t: Tensor, batch: Batch, heads: int, dim: int, *, copied: bool) -> Tensor:
    """.view(B, S, N, D).transpose(1, 2): a view; what comes back through rotary is (B, N, S, D)-contiguous."""
    return b.view(t, batch.size, heads, batch.seq, dim, label="heads", grad_copied=copied)
