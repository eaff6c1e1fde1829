"""Multi-head latent attention: keys and values out of one small vector for each token (DeepSeek-V2, arXiv:2405.04434).

Mirrors transformers 5.23, models/deepseek_v3 (DeepseekV3Attention.forward, expand_kv,
apply_rotary_pos_emb_interleave). What is cached is the small vector and the one rotated key that all heads share;
training expands both. Every name that forward gives lives until it returns.
"""

from __future__ import annotations

from peftplan.arch.core import Arch, Attention, Latent
from peftplan.errors import Unsupported
from peftplan.graph.blocks.attention import Site, attend
from peftplan.graph.blocks.kernels import only_transformers
from peftplan.graph.blocks.modules import project, rms_norm
from peftplan.graph.blocks.setup import Batch, Setup, Shared
from peftplan.graph.builder import Builder
from peftplan.graph.core import Grad, Tensor


def latent_attention(
    b: Builder, arch: Arch, a: Attention, setup: Setup, shared: Shared, h: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and eager attention's weights."""
    m, batch = a.latent, setup.batch
    assert m is not None
    only_transformers(setup.kernels, "latent attention")
    if batch.past or batch.prefix or batch.groups > 1:
        raise Unsupported(f"{arch.family}: a cache or prefix before the tokens is not modelled with latent attention")
    plain, rows = a.head_dim - m.rope_dim, (batch.size, a.heads, batch.seq)
    q = _by_head(b, _queries(b, arch, a, setup, h), *rows, a.head_dim)
    q_pass = b.part(q, *rows, plain, label="q_pass")
    q_rot = b.part(q, *rows, m.rope_dim, label="q_rot")
    down = project(
        b, h, m.rank + m.rope_dim, label="kv_a_proj_with_mqa", site="kv_a", types=setup.types, biased=a.qkv_bias
    )
    small = b.part(down, batch.size, batch.seq, m.rank, label="kv_latent")
    k_rot = b.part(down, batch.size, 1, batch.seq, m.rope_dim, label="k_rot")
    latent = rms_norm(b, arch, setup, small, "kv_a_layernorm")
    q_turned, k_turned = (_turned(b, t, shared, n) for t, n in ((q_rot, "q_rope"), (k_rot, "k_rope")))
    if setup.caches:
        fresh = latent, k_turned
        latent, k_turned = b.copy(latent, label="k_cache"), b.copy(k_turned, label="v_cache")
        b.hold(*fresh)
    query = b.concat((q_pass, q_turned), *rows, a.head_dim, label="query")
    key, value, both = _expanded(b, a, m, setup, latent, k_turned)
    site = _site(a, setup, batch)
    out, weights = attend(b, site, query, key, value, shared.mask)
    y = project(b, out, arch.hidden, label="o_proj", site="o", types=setup.types, biased=a.out_bias)
    b.hold(q, down, latent, q_turned, k_turned, query, key, both, out)
    return y, weights


def _queries(b: Builder, arch: Arch, a: Attention, setup: Setup, h: Tensor) -> Tensor:
    """q_proj, or q_b_proj(q_a_layernorm(q_a_proj(x)))."""
    width, types = a.heads * a.head_dim, setup.types
    assert a.latent is not None
    if a.latent.query_rank is None:
        return project(b, h, width, label="q_proj", site="q", types=types)
    small = project(b, h, a.latent.query_rank, label="q_a_proj", site="q_a", types=types, biased=a.qkv_bias)
    normed = rms_norm(b, arch, setup, small, "q_a_layernorm")
    b.hold(small)
    return project(b, normed, width, label="q_b_proj", site="q_b", types=types)


def _by_head(b: Builder, t: Tensor, size: int, heads: int, seq: int, dim: int) -> Tensor:
    """.view(B, S, N, D).transpose(1, 2): the gradient comes back by head and is copied."""
    return b.view(t, size, heads, seq, dim, label="heads", grad_copied=True)


def _turned(b: Builder, x: Tensor, shared: Shared, label: str) -> Tensor:
    """Pairs of neighbours are turned: even and odd dimensions apart, then one after the other."""
    cos, sin = shared.cos, shared.sin  # their first halves, as views
    half = (*x.shape[:-1], x.shape[-1] // 2)
    with b.scope(label):
        even, odd = b.slice(x, *half, label="even"), b.slice(x, *half, label="odd")
        first = b.minus(b.mul(even, cos, label="even_cos"), b.mul(odd, sin, label="odd_sin"), label="first")
        second = b.add(b.mul(odd, cos, label="odd_cos"), b.mul(even, sin, label="even_sin"), label="second")
        return b.concat((first, second), *x.shape)


def _expanded(
    b: Builder, a: Attention, m: Latent, setup: Setup, latent: Tensor, k_rot: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """expand_kv: keys, values, and the projection that holds both. The keys are filled in place, part by part; in
    backward each part clones the whole gradient (torch/csrc/autograd/functions/tensor.cpp, CopySlices)."""
    plain, rows = a.head_dim - m.rope_dim, (setup.batch.size, a.heads, setup.batch.seq)
    wide = plain + m.value_dim
    up = project(b, latent, a.heads * wide, label="kv_b_proj", site="kv_b", types=setup.types)
    both = _by_head(b, up, *rows, wide)
    k_pass = b.part(both, *rows, plain, label="k_pass")
    value = b.part(both, *rows, m.value_dim, label="value")
    whole = Tensor("", (*rows, a.head_dim), both.dtype)
    part_bytes, rot_bytes = (whole.nbytes // a.head_dim * n for n in (plain, m.rope_dim))
    begun = b.formula("key_begun", whole, k_pass, grads=(Grad(k_pass, part_bytes, whole.nbytes),))
    filled = whole._replace(base=begun.name)
    key = b.formula("key", filled, begun, k_rot, grads=(Grad(begun, whole.nbytes), Grad(k_rot, rot_bytes)))
    return key, value, both


def _site(a: Attention, setup: Setup, batch: Batch) -> Site:
    return Site(
        attention=a,
        size=batch.size,
        seq=batch.seq,
        implementation=setup.attention,
        documents=batch.documents,
        padded=batch.masked,
        use_cache=False,
        by_head=True,
        values_by_head=False,
        past=0,
        past_dtype=setup.types.embedding,
        prefix=0,
        prefix_dtype=setup.types.embedding,
        half=setup.types.linear,
    )
