"""Llama-shaped decoders as ops, mirroring transformers 5.23 line by line.

modeling_llama.py, modeling_mistral.py, modeling_qwen2.py, modeling_qwen3.py, modeling_gemma.py, modeling_phi3.py,
modeling_smollm3.py: LlamaDecoderLayer.forward and its siblings differ by the switches of `Arch` only. `hold` marks
the Python locals that outlive their last use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftplan.arch.core import Arch, Attention, Layer, Mlp
from peftplan.graph.blocks.attention import Site, attend
from peftplan.graph.blocks.loss import LossStyle, causal_lm_loss, fused_head_loss, returned_logits
from peftplan.graph.blocks.modeling import TRANSFORMERS_5, Modeling
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import INPUT, Graph, Region, Tensor
from peftplan.graph.ops import Embedding
from peftplan.units import DType

FP32 = DType.float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The shape of one micro-batch: B rows of S tokens; `masked` where a padding mask is present; `documents` in each
    row, told apart by their positions where they are several."""

    size: int
    seq: int
    masked: bool = False
    documents: int = 1
    past: int = 0
    """Tokens before the first whose keys and values come with the batch, as a cache."""
    prefix: int = 0
    """Tokens whose keys and values every layer puts before its own, where the model's mask does not count them."""
    prefix_computed: bool = True
    """Whether they come out of a matrix product, and not straight from a weight."""
    groups: int = 1
    """Parts of a row that attention looks at alone, half of the heads at parts that lie half a part further on."""

    @property
    def keys(self) -> int:
        """How many tokens attention looks at."""
        return self.past + self.seq

    @staticmethod
    def of(batching: str, *, size: int, seq: int) -> Batch:
        """B sequences of S tokens: padded or exact as they are, packed into one row of B*S."""
        if batching == "packed":
            return Batch(size=1, seq=size * seq, documents=size)
        return Batch(size=size, seq=seq, masked=batching == "padded")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightTypes:
    """The dtypes weights are held in: linear layers of the blocks, norms, the embedding, the head."""

    linear: DType
    norm: DType
    embedding: DType
    head: DType
    bias: DType
    opaque: bool = False
    """Whether the blocks' linear layers run in kernels that autocast does not reach (they return the input's dtype)."""
    widened: frozenset[str] = frozenset()
    """Linear layers (by path) whose adapters cast what autocast computes back to the input's dtype."""

    @staticmethod
    def all(dtype: DType) -> WeightTypes:
        return WeightTypes(linear=dtype, norm=dtype, embedding=dtype, head=dtype, bias=dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Everything a block needs besides the architecture."""

    batch: Batch
    types: WeightTypes
    numerics: Numerics
    attention: str = "sdpa"
    use_cache: bool = True
    """Whether transformers builds a KV cache during the forward."""
    loss: LossStyle = "shifted_labels"
    """Which releases of transformers the loss is computed as (`blocks/loss.py`)."""
    modeling: Modeling = TRANSFORMERS_5
    """Whose modelling code runs."""

    @property
    def caches(self) -> bool:
        """Whether layers put their keys and values into a cache."""
        return self.use_cache and not self.modeling.drops_cache


def decoder(arch: Arch, setup: Setup) -> Graph:
    """The whole model with its causal-LM loss."""
    b, s = setup.batch.size, setup.batch.seq
    ids = Tensor("@input_ids", (b, s), DType.int64, INPUT)
    labels = Tensor("@labels", (b, s), DType.int64, INPUT)
    inputs: tuple[Tensor, ...] = (ids, labels)
    if setup.batch.masked or setup.modeling.mask_given:
        inputs = (*inputs, Tensor("@attention_mask", (b, s), DType.int64, INPUT))
    if setup.batch.documents > 1:
        inputs = (*inputs, Tensor("@positions", (b, s), DType.int64, INPUT))
    first, shared = _entrance(arch, setup, ids)
    regions = [first]
    index = 0
    for layer, count in arch.layers:
        left = count
        while left:
            entry = regions[-1].exit.dtype
            region = _layer(arch, layer, setup, shared, entry, index, left)
            if region.exit.dtype is not entry:  # an fp32 norm on a half-precision stream makes it fp32
                region = replace(region, count=1)
            regions.append(region)
            index, left = index + region.count, left - region.count
    regions.append(_final_norm(arch, setup, regions[-1].exit.dtype))
    regions.append(_head(arch, setup, labels, regions[-1].exit))
    return Graph(regions=tuple(regions), inputs=inputs, buffers=_buffers(arch, setup))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shared:
    """Values every layer reads: rotary tables, masks (full and sliding)."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    window_mask: Tensor | None


def _buffers(arch: Arch, setup: Setup) -> tuple[Tensor, ...]:
    """Non-persistent buffers: rotary inverse frequencies (twice), Gemma's embedding scale."""
    names = ("inv_freq", "original_inv_freq")[: setup.modeling.frequency_tables]
    tables = tuple(Tensor(f"@{n}", (_rotary_width(arch) // 2,), FP32, "buffer") for n in names)
    return (*tables, Tensor("@embed_scale", (), setup.types.linear, "buffer")) if arch.embed_scale else tables


def _rotary_width(arch: Arch) -> int:
    return max((layer.attention.rotary_dim or 0 for layer, _ in arch.layers), default=0)


def _entrance(arch: Arch, setup: Setup, ids: Tensor) -> tuple[Region, _Shared]:
    """LlamaModel.forward up to the first layer: embedding, positions, mask, rotary tables."""
    b = Builder(setup.numerics)
    types, batch = setup.types, setup.batch
    weight = Tensor("@embed_tokens.weight", (arch.vocab, arch.hidden), types.embedding, "weight")
    out = Tensor("embed_tokens", (batch.size, batch.seq, arch.hidden), types.embedding)
    b.ops.append(Embedding(name="embed_tokens", ins=(ids, weight), out=out, site="embed"))
    with b.marked("embed"):  # part of the embedding's module
        hidden = b.scale(out, label="embed_scale") if arch.embed_scale else out
    position = b.make("position_ids", 1, batch.seq, dtype=DType.int64, temporary_bytes=8 * batch.seq)
    if setup.modeling.repeats_positions and batch.size > 1:
        b.make("row_positions", batch.size, batch.seq, dtype=DType.int64, ins=(position,))
    mask, window_mask = _masks(arch, setup, b)
    cos, sin = _rotary_tables(b, _rotary_width(arch), setup, position, hidden.dtype)
    shared = _Shared(cos=cos, sin=sin, mask=mask, window_mask=window_mask)
    return Region(name="embed", ops=tuple(b.ops), entry=None, exit=hidden), shared


def _rotary_tables(b: Builder, dims: int, setup: Setup, position: Tensor, dtype: DType) -> tuple[Tensor, Tensor]:
    """LlamaRotaryEmbedding.forward."""
    seq = setup.batch.seq
    table = 4 * seq * dims
    if setup.modeling.rotary_product and dims:
        rows = b.plain("positions_fp32", seq, 1, dtype=FP32, ins=(position,))
        frequencies = Tensor("@inv_freq", (1, dims // 2, 1), FP32, "buffer")
        position = b.detached_linear(frequencies, rows, label="freqs")
    cos = b.make("cos", 1, seq, dims, dtype=dtype, ins=(position,), temporary_bytes=3 * table)
    sin = b.make("sin", 1, seq, dims, dtype=dtype, ins=(position,), temporary_bytes=3 * table)
    return cos, sin


def _masks(arch: Arch, setup: Setup, b: Builder) -> tuple[Tensor | None, Tensor | None]:
    """masking_utils.create_causal_mask and create_sliding_window_causal_mask.

    sdpa: a boolean (B, 1, S, S) mask, skipped where there is no padding, one document, and the window is not reached;
    eager: always, as an additive mask of the hidden dtype (B, 1, S, S), boolean as a temporary.
    """
    batch = setup.batch
    windows = {layer.attention.window for layer, _ in arch.layers}
    whole = batch.masked or setup.modeling.mask_given
    rows = batch.size if whole else 1  # without padding the mask is one square, seen B times
    square = rows * batch.seq * batch.keys

    def one(label: str, *, needed: bool) -> Tensor | None:
        shape = (batch.size, 1, batch.seq, batch.keys)
        if setup.attention == "eager":
            return b.make(label, *shape, dtype=setup.types.embedding, temporary_bytes=square)
        if needed and setup.attention.startswith("sdpa"):
            one_row = batch.seq * batch.keys
            mask = b.make(label, rows, 1, batch.seq, batch.keys, dtype=DType.boolean, temporary_bytes=one_row)
            return mask.view(*shape)
        return None

    always = batch.masked or batch.documents > 1 or batch.past > 0
    full = one("causal_mask", needed=always) if None in windows else None
    widths = [w for w in windows if w is not None]
    reached = any(batch.seq >= w for w in widths)
    window = one("window_mask", needed=always or reached) if widths else None
    return full, window


def rms_norm(b: Builder, arch: Arch, x: Tensor, dtype: DType, label: str) -> Tensor:
    """LlamaRMSNorm.forward / GemmaRMSNorm.forward: computed in fp32 whatever x is."""
    weight = b.weight(f"{label}.weight", x.shape[-1], dtype=dtype)
    with b.scope(label), b.marked("norm"):
        x32 = b.cast(x, FP32, label="x32")
        mean = b.mean_last(b.square(x32))
        inverse = b.rsqrt(b.add_const(mean))
        normed = b.mul(x32, inverse, label="normed")
        if arch.norm == "rms_plus_one":
            gain = b.add_const(b.cast(weight, FP32, label="w32"), label="gain")
            scaled = b.mul(normed, gain, label="scaled")
            out = b.cast(scaled, x.dtype, label="out")
            b.hold(scaled)
            return out
        out = b.mul(weight, b.cast(normed, x.dtype, label="xhat"), label="out")
        b.hold(normed, mean)
        return out


def project(
    b: Builder, x: Tensor, width: int, *, label: str, site: str, types: WeightTypes, biased: bool = False
) -> Tensor:
    """One nn.Linear of the block."""
    weight = b.weight(f"{label}.weight", width, x.shape[-1], dtype=types.linear)
    bias = b.weight(f"{label}.bias", width, dtype=types.bias) if biased else None
    with b.marked(site):
        y = b.linear(x, weight, bias, label=label, autocast=not types.opaque)
        wide = weight.name.removesuffix(".weight") in types.widened
        return b.cast(y, x.dtype, label=f"{label}_widened") if wide else y


def _layer(arch: Arch, layer: Layer, setup: Setup, shared: _Shared, dtype: DType, index: int, count: int) -> Region:
    """LlamaDecoderLayer.forward."""
    b = Builder(setup.numerics)
    x = Tensor("hidden", (setup.batch.size, setup.batch.seq, arch.hidden), dtype)
    h = rms_norm(b, arch, x, setup.types.norm, "input_layernorm")
    with b.scope("self_attn"):
        o, weights = _attention(b, arch, layer.attention, setup, shared, h)
    b.hold(h)
    o = b.dropout(o, layer.residual_dropout, label="resid_attn_dropout")
    mid = b.add(x, o, label="residual_attn")
    h = rms_norm(b, arch, mid, setup.types.norm, "post_attention_layernorm")
    with b.scope("mlp"):
        d = _mlp(b, layer.mlp, setup, h)
    b.hold(h)
    d = b.dropout(d, layer.residual_dropout, label="resid_mlp_dropout")
    out = b.add(mid, d, label="residual_mlp")
    b.hold(x, mid, *weights)
    cached = ("self_attn.k_cache", "self_attn.v_cache", "self_attn.cache_length")
    lasts = setup.caches or arch.returns_cache
    cache = tuple(op.out.name for op in b.ops if op.out.name in cached)
    given = ("self_attn.past_key", "self_attn.past_value", "self_attn.prefix")
    past = {t.name: t for op in b.ops for t in op.ins if t.name in given}
    return Region(
        name="layers",
        ops=tuple(b.ops),
        entry=x,
        exit=out,
        count=count,
        first_index=index,
        returned=cache if lasts else (),
        held=() if lasts else cache,
        taken=tuple(past.values()),
    )


def module_order(name: str) -> tuple[int, bool, bool]:
    """Sort key that puts a layer's parameters in the order of `model.parameters()`: attention, feed-forward, norms;
    Phi-3 makes its output projection before the fused one."""
    room = 0 if name.startswith("self_attn.") else 1 if name.startswith("mlp.") else 2
    return room, "norm." in name, "qkv_proj" in name


def _attention(
    b: Builder, arch: Arch, a: Attention, setup: Setup, shared: _Shared, h: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """LlamaAttention.forward: projections, per-head norms (Qwen3), rotary embedding, attention, output projection.

    Returns the output and, from eager attention, the attention weights: a local of the layer until it returns.
    """
    types, batch = setup.types, setup.batch
    q_width, kv_width = a.heads * a.head_dim, a.kv_heads * a.head_dim
    eager = setup.attention == "eager"  # its products give gradients head by head

    def split(t: Tensor, heads: int, *, copied: bool = True) -> Tensor:
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
    if setup.modeling.copies_heads:
        views = q, k, v
        q, k, v = (b.copy(t, label=n) for t, n in ((q, "q_heads"), (k, "k_heads"), (v, "v_heads")))
        b.hold(*views)
    if a.rotary_dim is not None:
        q_pre, k_pre = q, k
        q = _rotary(b, q, a, shared, "q_rope")
        k = _rotary(b, k, a, shared, "k_rope")
        b.hold(q_pre, k_pre)
    mask = shared.window_mask if a.window is not None else shared.mask
    site = Site(
        attention=a,
        size=batch.size,
        seq=batch.seq,
        implementation=setup.attention,
        documents=batch.documents,
        padded=batch.masked,
        use_cache=setup.caches,
        by_head=a.rotary_concat or setup.modeling.copies_heads,
        values_by_head=setup.modeling.copies_heads,
        past=batch.past,
        past_dtype=types.embedding,
        prefix=batch.prefix,
        prefix_dtype=_prefix_dtype(setup),
        half=types.linear,
        groups=batch.groups,
    )
    out, weights = attend(b, site, q, k, v, mask)
    y = project(b, out, arch.hidden, label="o_proj", site="o", types=types, biased=a.out_bias)
    rebound = () if setup.caches else (k, v)  # the cache hands back keys and values of its own
    b.hold(*fused, q, *rebound, out)
    return y, weights


def _prefix_dtype(setup: Setup) -> DType:
    """What autocast computes; the weights themselves are float32 under it."""
    if setup.numerics.autocast is None:
        return setup.types.embedding
    return setup.numerics.autocast if setup.batch.prefix_computed else FP32


def _head_norm(b: Builder, arch: Arch, a: Attention, setup: Setup, t: Tensor, heads: int, label: str) -> Tensor:
    """Qwen3's q_norm and k_norm over head_dim."""
    if not a.qk_norm:
        return t
    out = rms_norm(b, arch, t.view(setup.batch.size, setup.batch.seq, heads, a.head_dim), setup.types.norm, label)
    b.hold(t)
    return out


def _heads(b: Builder, t: Tensor, batch: Batch, heads: int, dim: int, *, copied: bool) -> Tensor:
    """.view(B, S, N, D).transpose(1, 2): a view; what comes back through rotary is (B, N, S, D)-contiguous."""
    return b.view(t, batch.size, heads, batch.seq, dim, label="heads", grad_copied=copied)


def _rotary(b: Builder, x: Tensor, a: Attention, shared: _Shared, label: str) -> Tensor:
    """apply_rotary_pos_emb for one of q, k (Su 2021, arXiv:2104.09864); partial rotary concatenates the rest."""
    with b.scope(label):
        if not a.rotary_concat:
            return _turned(b, x, shared)
        dim = a.rotary_dim or a.head_dim
        part = b.slice(x, *x.shape[:-1], dim, label="rot")
        rest = b.slice(x, *x.shape[:-1], a.head_dim - dim, label="pass")
        return b.concat((_turned(b, part, shared), rest), *x.shape)


def _turned(b: Builder, x: Tensor, shared: _Shared) -> Tensor:
    """x cos + rotate_half(x) sin."""
    straight = b.mul(x, shared.cos, label="x_cos")
    turned = b.mul(b.rotate_half(x), shared.sin, label="x_sin")
    return b.add(straight, turned, label="sum")


def _mlp(b: Builder, m: Mlp, setup: Setup, h: Tensor) -> Tensor:
    """LlamaMLP.forward: down(act(gate(x)) * up(x)); Phi3MLP.forward with one fused projection."""
    types, batch = setup.types, setup.batch
    hidden = h.shape[-1]
    if m.fused_gate_up:
        both = project(b, h, 2 * m.size, label="gate_up_proj", site="gate_up", types=types)
        gate, up = (b.slice(both, batch.size, batch.seq, m.size, label=n) for n in ("gate", "up"))
        product = b.mul(up, b.activate(gate), label="glu")
        d = project(b, product, hidden, label="down_proj", site="down", types=types)
        b.hold(both, product)
        return d
    gate = project(b, h, m.size, label="gate_proj", site="gate", types=types, biased=m.bias)
    act = b.activate(gate)
    up = project(b, h, m.size, label="up_proj", site="up", types=types, biased=m.bias)
    product = b.mul(act, up, label="glu")
    return project(b, product, hidden, label="down_proj", site="down", types=types, biased=m.bias)


def _final_norm(arch: Arch, setup: Setup, dtype: DType) -> Region:
    """The last norm of the backbone."""
    b = Builder(setup.numerics)
    x = Tensor("hidden", (setup.batch.size, setup.batch.seq, arch.hidden), dtype)
    out = rms_norm(b, arch, x, setup.types.norm, "norm")
    b.hold(x)
    return Region(name="norm", ops=tuple(b.ops), entry=x, exit=out)


def _head(arch: Arch, setup: Setup, labels: Tensor, h: Tensor) -> Region:
    """lm_head and the loss."""
    b = Builder(setup.numerics)
    types = setup.types
    name = "@embed_tokens.weight" if arch.tied else "@lm_head.weight"
    weight = Tensor(name, (arch.vocab, arch.hidden), types.head, "weight")
    if setup.loss == "fused_head":
        loss = fused_head_loss(b, h, weight, labels)
        return Region(name="head", ops=tuple(b.ops), entry=h, exit=loss)
    with b.marked("head"):
        logits = b.linear(h, weight, label="lm_head")
    loss = causal_lm_loss(b, logits, labels, h, setup.loss)
    returned = (returned_logits(setup.loss, logits),)
    return Region(name="head", ops=tuple(b.ops), entry=h, exit=loss, returned=returned)
