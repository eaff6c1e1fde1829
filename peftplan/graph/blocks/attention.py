"""From per-head q, k, v to the input of the output projection, one function per way torch computes attention.

Mirrors transformers 5.23 (integrations/sdpa_attention.py, integrations/flash_attention.py, the models' own
eager_attention_forward) and torch 2.13 (aten/src/ATen/native/transformers/attention.cpp, cuda/attention.cu,
cuda/attention_backward.cu, cuda/sdp_utils.cpp) and the flash-attention package
(csrc/flash_attn/flash_api.cpp, hopper/flash_api.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass

from peftplan.arch.core import Attention
from peftplan.errors import RequestError
from peftplan.graph.blocks.groups import shifted
from peftplan.graph.builder import Builder
from peftplan.graph.core import Grad, Tensor
from peftplan.graph.ops import FusedAttention, internal
from peftplan.units import DType, promote, round_up

FP32 = DType.float32
AMPERE = (8, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where attention happens: its shape, the implementation asked for, and what the model around it does."""

    attention: Attention
    size: int
    seq: int
    implementation: str
    documents: int
    """How many sequences share a row."""
    padded: bool
    """Whether the batch has a padding mask, which flash attention turns into ragged sequences."""
    use_cache: bool
    by_head: bool
    """Whether queries and keys lie in memory as (B, N, S, D), not as projected."""
    values_by_head: bool
    """Whether values do."""
    past: int
    """Tokens whose keys and values come as a cache."""
    prefix: int
    """Tokens whose keys and values the layer itself puts before its own, and before the mask."""
    past_dtype: DType
    prefix_dtype: DType
    half: DType
    """What flash attention casts fp32 queries to outside autocast: the dtype of the linear layers."""
    groups: int = 1
    """Parts of a row that are attended to alone."""
    repeats_always: bool = False
    """Whether flash attention too is given keys and values once for every query head."""

    @property
    def keys(self) -> int:
        return self.past + self.prefix + self.seq

    @property
    def joined(self) -> bool:
        """Whether keys and values are put together out of parts, which lays them out by head."""
        return self.past + self.prefix > 0

    @property
    def full_shape(self) -> tuple[int, int, int, int]:
        return self.size, self.attention.heads, self.seq, self.attention.head_dim

    @property
    def full_out(self) -> tuple[int, int, int, int]:
        return self.size, self.attention.heads, self.seq, self.attention.value_dim

    @property
    def full_keys(self) -> tuple[int, int, int, int]:
        return self.size, self.attention.heads, self.keys, self.attention.head_dim

    @property
    def repeats(self) -> int:
        return self.attention.heads // self.attention.kv_heads


def attend(
    b: Builder, site: Site, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """From per-head q, k, v to the (B, S, N*D) input of the output projection, and what the layer is handed
    besides: eager attention's weights."""
    if site.prefix:
        k, v, mask = _after_prefix(b, site, k, v, mask)
    if site.past:
        k, v = _after_past(b, site, k, "key"), _after_past(b, site, v, "value")
    elif site.use_cache:
        # DynamicLayer.lazy_initialization takes the keys' dtype for both; torch.cat promotes the values to it.
        k, v = b.copy(k, label="k_cache"), b.copy(v, label="v_cache", dtype=promote(k.dtype, v.dtype))
        if site.attention.window is not None:  # DynamicSlidingWindowLayer counts the tokens it has seen in a tensor
            b.plain("cache_length", dtype=DType.int64)
    if site.groups > 1:
        return shifted(b, site, attend, q, k, v, mask), ()
    if site.implementation.startswith("flash_attention"):
        if site.repeats_always:
            k, v = (_repeated(b, site, t, n) for t, n in ((k, "k_repeat"), (v, "v_repeat")))
        return _flash_package(b, site, q, k, v), ()
    if not _takes_groups(site, mask):
        k, v = (_repeated(b, site, t, n) for t, n in ((k, "k_repeat"), (v, "v_repeat")))
    if site.implementation == "eager":
        return _eager(b, site, q, k, v, mask)
    given = q, k, v
    q, k, v = (b.autocast(t) for t in given)
    kernel = sdpa_kernel(b, site, q, k, mask)
    out = _math(b, site, q, k, v, mask) if kernel == "math" else _sdpa(b, site, kernel, q, k, v, mask)
    if b.numerics.autocast is not None:
        b.hold(*given)
    return out, ()


def _after_past(b: Builder, site: Site, t: Tensor, what: str) -> Tensor:
    """DynamicLayer.update: the cache is concatenated anew, and the old one goes."""
    shape = (site.size, site.attention.kv_heads, site.past, site.attention.head_dim)
    past = Tensor(f"self_attn.past_{what}", shape, site.past_dtype)
    return b.concat((past, t), *shape[:2], site.keys, shape[3], label=f"{what[0]}_cache")


def _after_prefix(
    b: Builder, site: Site, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """PrefixTuningLayer.compose_single (adapters 1.3.0, methods/prefix_tuning.py): every layer takes its part of the
    prefixes of all, which live on, and puts it before its keys and values; a mask is written anew for each layer."""
    own = (site.size, site.attention.kv_heads, site.prefix, site.attention.head_dim)
    part = Tensor("self_attn.prefix", (2, *own), site.prefix_dtype, stored_bytes=0)
    shape = (*own[:2], site.keys, own[3])
    keys, values = (b.concat((part, t), *shape, label=f"{n}_prefixed") for t, n in ((k, "k"), (v, "v")))
    longer = None
    if mask is not None:
        ahead = (site.size, 1, site.seq, site.prefix)
        ones = b.plain("prefix_ones", *ahead, dtype=FP32)
        said = ones if mask.dtype is FP32 else b.plain("prefix_said", *ahead, dtype=mask.dtype, ins=(ones,))
        b.hold(ones)
        turned = b.plain("prefix_mask", *ahead, dtype=mask.dtype, ins=(said,))
        b.hold(said)
        longer = b.plain("longer_mask", site.size, 1, site.seq, site.keys, dtype=mask.dtype, ins=(turned, mask))
        b.hold(turned)
    b.hold(k, v)
    return keys, values, longer


def _takes_groups(site: Site, mask: Tensor | None) -> bool:
    """Whether K and V go in unrepeated: sdpa_attention.use_gqa_in_sdpa. Under `sdpa_efficient`, a kernel that
    refuses enable_gqa, they are repeated always."""
    if site.implementation in ("eager", "sdpa_efficient"):
        return False
    return mask is None and site.attention.head_dim <= 256


def _repeated(b: Builder, site: Site, t: Tensor, label: str) -> Tensor:
    """repeat_kv: a contiguous copy with every K or V head as often as queries share it."""
    return t if site.repeats == 1 else b.copy(t, *site.full_keys, label=label, grad_copied=True)


# -- which kernel
# -----------------------------------------------------------------------------------------------


def sdpa_kernel(b: Builder, site: Site, q: Tensor, k: Tensor, mask: Tensor | None) -> str:
    """`flash`, `efficient`, `math` (sdp_utils.cpp, select_sdp_backend) or `cpu`, torch's own flash on a CPU.

    An unknown GPU counts as Ampere or newer. cuDNN's kernel, preferred on Hopper from cuDNN 9.15.1 on, keeps
    what flash keeps, and is taken for it.
    """
    asked = site.implementation.removeprefix("sdpa").removeprefix("_")
    if asked == "math":
        return "math"
    if b.numerics.backend == "cpu":  # sdp_utils_cpp.cpp, check_head_dim_size_cpp
        return "cpu" if site.attention.value_dim == site.attention.head_dim else "math"
    allowed = (asked,) if asked else ("flash", "efficient")
    return next((kernel for kernel in allowed if _able(b, site, kernel, q, k, mask)), "math")


def _able(b: Builder, site: Site, kernel: str, q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    capability = b.numerics.capability or AMPERE
    if kernel == "flash":
        if site.attention.value_dim != site.attention.head_dim:  # check_head_dim_size_flash
            return False
        if site.prefix:  # causal over more keys than queries: check_flash_causal_non_square_seqlens
            return False
        return mask is None and q.dtype.is_half and capability >= AMPERE and site.attention.head_dim <= 256
    aligned = site.attention.head_dim % (8 if q.dtype.is_half else 4) == 0
    grouped = k.shape[1] != q.shape[1]
    return aligned and not grouped and (q.dtype is not DType.bfloat16 or capability >= AMPERE)


def kernel_class(capability: tuple[int, int] | None, implementation: str) -> tuple[bool, bool]:
    """What the rules of this file see of a compute capability: GPUs of one class build the same graph, or none."""
    known = capability or AMPERE
    return known >= AMPERE, implementation == "flash_attention_3" and capability is not None and known[0] != 9


# -- fused kernels
# ----------------------------------------------------------------------------------------------


def _sdpa(b: Builder, site: Site, kernel: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """scaled_dot_product_attention's fused kernels: q, k, v, out and the log-sum-exp stay for backward."""
    name = b.name("attention")
    rows = round_up(site.seq, 32) if kernel == "efficient" else site.seq  # kAlignLSE
    extras = [internal(name, "lse", (site.size, site.attention.heads, rows), FP32)]
    if kernel == "flash":
        extras += _generator_state(name)
    work = 0
    if mask is not None:
        bias = mask.shape if kernel == "cpu" else (*mask.shape[:-1], round_up(mask.shape[-1], 8))
        extras.append(internal(name, "bias", bias, q.dtype))
        work = mask.numel * q.dtype.size if bias != mask.shape else 0  # before pad_bias copies it
    back = {"flash": _flash_backward, "efficient": _efficient_backward, "cpu": _none}[kernel](b, site, q, k)
    out = _emit(b, site, name, (q, k, v), tuple(extras), work, back)
    # The output has the query's strides: (B, S, N, D) as projected, or (B, N, S, D) where rotary
    # concatenated;
    # the memory-efficient kernel always writes (B, S, N, D).
    copied = site.by_head and kernel != "efficient"
    return b.copy(out, label="attn_output") if copied else out


def _flash_package(b: Builder, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash-attention package as transformers calls it: (B, S, N, D) views without a mask; padded batches
    are gathered into one ragged sequence and scattered back (modeling_flash_attention_utils.py,
    _upad_input)."""
    _check_flash(b, site)
    target = b.numerics.autocast or site.half
    if q.dtype is FP32:
        q, k, v = (b.cast(t, target, label=n) for t, n in ((q, "q_half"), (k, "k_half"), (v, "v_half")))
    if not q.dtype.is_half:
        raise RequestError(
            f"--attention {site.implementation} computes in fp16 or bf16 only, not in {q.dtype.label}; "
            "use --attention sdpa, or a half --dtype or --precision"
        )
    if site.padded:
        q, k, v = (b.copy(t, label=n, grad_copied=True) for t, n in ((q, "q_unpad"), (k, "k_unpad"), (v, "v_unpad")))
    narrow = site.attention.value_dim < site.attention.head_dim
    if narrow:  # integrations/flash_attention.py: padded to the queries' width, and cropped again
        v = b.formula("v_padded", Tensor("", site.full_keys, v.dtype), v, grads=(Grad(v, v.logical_bytes),))
    name = b.name("attention")
    extras = [internal(name, "lse", (site.size, site.attention.heads, site.seq), FP32)]
    newer = site.implementation == "flash_attention_3"
    extras += [] if newer else _generator_state(name)[:1]
    back = (_flash3_backward if newer else _flash_backward)(b, site, q, k)
    out = _emit(b, site, name, (q, k, v), tuple(extras), 0, back)
    out = b.copy(out, label="pad_output", grad_copied=True) if site.padded else out
    if narrow:
        width = site.attention.heads * site.attention.value_dim
        cropped = b.slice(out, site.size, site.seq, width, label="cropped")
        return b.copy(cropped, label="attn_output")
    return out


def _check_flash(b: Builder, site: Site) -> None:
    """What the packages say at the first call: FA2 needs Ampere or newer, FA3 Hopper, both heads of at most 256."""
    capability, three = b.numerics.capability, site.implementation == "flash_attention_3"
    if site.attention.head_dim > 256:
        raise RequestError(
            f"--attention {site.implementation} takes heads of at most 256, not {site.attention.head_dim}; use sdpa"
        )
    if capability is not None and (capability[0] != 9 if three else capability < AMPERE):
        needs = "a Hopper GPU (9.0)" if three else "an Ampere GPU (8.0) or newer"
        has = ".".join(map(str, capability))
        raise RequestError(f"--attention {site.implementation} needs {needs}, this one is {has}; use --attention sdpa")


def _generator_state(name: str) -> list[Tensor]:
    """Two scalars on the device even without dropout (flash_api.cpp, mha_fwd: rng_state, _unused)."""
    return [internal(name, label, shape, DType.int64) for label, shape in (("rng_state", (2,)), ("unused", ()))]


def _emit(
    b: Builder,
    site: Site,
    name: str,
    ins: tuple[Tensor, ...],
    extras: tuple[Tensor, ...],
    work: int,
    back: int,
) -> Tensor:
    a = site.attention
    out = Tensor(name, (site.size, site.seq, a.heads * ins[2].shape[-1]), ins[0].dtype)
    op = FusedAttention(
        name=name,
        ins=ins,
        out=out,
        kv_len=site.keys // (site.documents if site.implementation.startswith("flash_attention") else 1),
        extras=extras,
        workspace_bytes=work,
        grad_workspace_bytes=back,
        site="attention",
    )
    b.ops.append(op)
    return out


def _none(b: Builder, site: Site, q: Tensor, k: Tensor) -> int:
    del b, site, q, k
    return 0


def _flash_backward(b: Builder, site: Site, q: Tensor, k: Tensor) -> int:
    """mha_bwd: fp32 sums of dq and of the softmax's gradient with rows rounded to 128 (mha_varlen_bwd: 128
    rows more for each sequence); dk and dv of every query head where heads share them."""
    del b
    size, heads, seq, dim = site.full_shape
    ragged = site.padded or site.documents > 1
    rows = seq + 128 * site.documents if ragged else round_up(seq, 128)
    columns = round_up(dim, 32 if dim <= 128 else 64)
    expanded = 2 * q.nbytes * site.keys // seq if k.shape[1] != heads else 0
    return 4 * size * rows * heads * (columns + 1) + expanded


def _flash3_backward(b: Builder, site: Site, q: Tensor, k: Tensor) -> int:
    """hopper/flash_api.cpp, mha_bwd: fp32 dq, two row vectors, and fp32 dk and dv where heads share them."""
    del b, q
    size, heads, seq, dim = site.full_shape
    rows, columns = round_up(seq, 128), round_up(dim, 64)
    shared = 8 * size * site.attention.kv_heads * round_up(site.keys, 128) * columns if k.shape[1] != heads else 0
    return 4 * size * heads * rows * (columns + 2) + shared


def _efficient_backward(b: Builder, site: Site, q: Tensor, k: Tensor) -> int:
    """mem_eff_attention/kernel_backward.h: the row sums `delta`; for half precision an fp32 dq
    (kNeedsAccumGradQ), and fp32 dk and dv where a head is wider than the kernel's 64-row blocks before Ampere
    (kOutputInRF)."""
    del k
    size, heads, seq, dim = site.full_shape
    delta = 4 * size * heads * seq
    if not q.dtype.is_half:
        return delta
    row = 4 * size * heads * round_up(dim, 32)
    before_ampere = (b.numerics.capability or AMPERE) < AMPERE
    shared = 2 * row * round_up(site.keys, 128) if before_ampere and dim > 64 else 0
    return delta + row * round_up(seq, 128) + shared


# -- composite ops
# ----------------------------------------------------------------------------------------------


def _eager(
    b: Builder, site: Site, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """eager_attention_forward: scores, scaling, mask, fp32 softmax, dropout, weighted sum, each a tensor.

    torch.matmul makes batch and heads one dimension (aten/src/ATen/native/LinearAlgebra.cpp, _matmul_impl), which
    copies what a projection left as (B, S, N, D) unless B is 1; what was concatenated or repeated is dense already.
    """
    a = site.attention
    single = site.size == 1
    dense = single or site.values_by_head or site.use_cache or site.joined or site.repeats > 1
    q_flat = q if single or site.by_head else b.copy(q, label="q_flat")
    k_flat = k if dense or site.by_head else b.copy(k, label="k_flat")
    scores = b.matmul(q_flat, k_flat, site.size, a.heads, site.seq, site.keys, inner=a.head_dim, label="scores")
    scores = b.scale(scores, label="scaled")
    if mask is not None:
        scores = b.add(scores, mask, label="masked")
    weights = b.cast(b.softmax(scores, FP32), q.dtype, label="weights")
    b.hold(scores)  # the name is bound anew only when the cast is done
    weights = b.dropout(weights, a.dropout)
    v_flat = v if dense else b.copy(v, label="v_flat")
    mixed = b.matmul(weights, v_flat, *site.full_out, inner=site.keys, label="mixed")
    width = a.heads * a.value_dim
    out = b.copy(mixed, site.size, site.seq, width, label="attn_output", grad_copied=not single)
    b.hold(k, v)
    return out, (weights,)


def _math(b: Builder, site: Site, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """_scaled_dot_product_attention_math: everything in fp32, q and k scaled apart, scores and weights as
    tensors."""
    a, dtype = site.attention, q.dtype
    square = (site.seq, site.keys)
    with b.scope("math"):
        bias = None if mask is None else b.plain("bias", *mask.shape, dtype=dtype, ins=(mask,))
        q32, k32, v32 = (b.cast(t, FP32, label=n) for t, n in ((q, "q32"), (k, "k32"), (v, "v32")))
        q_scaled = b.scale(q32, label="q_scaled")
        if bias is None:
            bias = b.plain("causal", *square, dtype=FP32)
        expanded, value = (_repeated(b, site, t, n) if t.shape[1] != a.heads else t
                      for t, n in ((k32, "k_repeat"), (v32, "v_repeat")))  # fmt: skip
        key = b.scale(expanded, label="k_scaled")
        single = site.size == 1  # batch and heads are one dimension then, whatever their order
        q_flat = q_scaled if site.by_head or single else b.copy(q_scaled, label="q_flat")
        dense = single or site.values_by_head or site.use_cache or site.joined or site.repeats > 1
        filled = a.latent is not None  # keys are put together in a new tensor, by head
        key = key if dense or filled else b.copy(key, label="k_flat")
        value_flat = value if dense else b.copy(value, label="v_flat")
        scores = b.matmul(q_flat, key, site.size, a.heads, *square, inner=a.head_dim, label="scores", autocast=False)
        if b.numerics.backend == "cpu":  # in place but under the modes that trace
            scores = b.add(scores, bias, label="masked")
        weights = b.softmax(scores, FP32, guarded=True)
        # The weights are returned too, in q's dtype, by a function whose callers drop them.
        second = weights if dtype is FP32 else b.plain("weights_half", *weights.shape, dtype=dtype, ins=(weights,))
        mixed = b.matmul(weights, value_flat, *site.full_out, inner=site.keys, label="mixed", autocast=False)
        out = b.cast(mixed, dtype, label="out")
        b.hold(q, k, v, q32, k32, v32, q_scaled, expanded, key, value, bias, weights, second)
    return b.copy(out, site.size, site.seq, a.heads * a.value_dim, label="attn_output")
