"""A feed-forward of experts: the router, the experts it chooses, the shared one.

Mirrors transformers 5.23: models/mixtral, models/qwen2_moe, models/qwen3_moe (TopKRouter, SparseMoeBlock) and
integrations/moe.py (grouped_mm_experts_forward). Rows are copied once for each expert they visit and sorted by expert,
so no size depends on how the router spreads them. Temporaries inside CUDA's sort and top-k are not modelled (they hold
a few integers for each row; too little is said).
"""

from __future__ import annotations

from peftplan.arch.core import Experts, Groups, Mlp
from peftplan.graph.blocks.kernels import only_transformers
from peftplan.graph.blocks.mlp import gated
from peftplan.graph.blocks.modules import project
from peftplan.graph.blocks.setup import Setup
from peftplan.graph.builder import Builder
from peftplan.graph.core import Grad, Tensor
from peftplan.graph.ops import GatedHalves, GroupedLinear, internal
from peftplan.units import DType

FP32, INT64, INT32 = DType.float32, DType.int64, DType.int32


def sparse(b: Builder, e: Experts, setup: Setup, h: Tensor) -> Tensor:
    """MixtralSparseMoeBlock.forward and its siblings: (B, S, H) -> (B, S, H)."""
    only_transformers(setup.kernels, "experts")
    tokens, hidden = setup.batch.size * setup.batch.seq, h.shape[-1]
    flat = h.view(tokens, hidden)
    after = e.router == "sigmoid_groups"
    shared = None if after else _shared(b, e, setup, flat, "shared_expert")
    with b.scope("gate"), b.marked("router"):
        logits, weights, chosen = _routed(b, e, setup, flat)
    with b.scope("experts"), b.marked("experts"):
        out = _grouped(b, e, setup, flat, weights, chosen)
    if after:
        mine = out
        out = b.add(out, _shared(b, e, setup, flat, "shared_experts") or out, label="with_shared")
        b.hold(mine)
    if shared is not None:
        ungated, out_of_experts = shared, out
        shared = _scaled(b, e, setup, flat, shared)
        b.hold(ungated)
        out = b.add(out, shared, label="with_shared")
        b.hold(shared, out_of_experts)
    b.hold(logits, weights, chosen)
    return out.view(*h.shape)


def _shared(b: Builder, e: Experts, setup: Setup, flat: Tensor, name: str) -> Tensor | None:
    """What the expert says that every token visits."""
    if e.shared_size is None:
        return None
    with b.scope(name):
        return gated(b, Mlp(size=e.shared_size, activation=e.activation), setup, flat)


def _scaled(b: Builder, e: Experts, setup: Setup, flat: Tensor, shared: Tensor) -> Tensor:
    """sigmoid(shared_expert_gate(x)) * shared."""
    if not e.shared_gate:
        return shared
    gate = project(b, flat, 1, label="shared_expert_gate", site="shared_gate", types=setup.types)
    return b.mul(b.squash(gate, label="shared_weight"), shared, label="shared_scaled")


# -- the router -------------------------------------------------------------------------------------------------------


def _routed(b: Builder, e: Experts, setup: Setup, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MixtralTopKRouter.forward, Qwen2MoeTopKRouter.forward: logits (T, E), weights and numbers of the best (T, k)."""
    weight = b.weight("weight", e.number, flat.shape[-1], dtype=setup.types.unpacked)
    if e.groups is not None:
        return _routed_by_groups(b, e, e.groups, flat, weight)
    logits = b.linear(flat, weight, label="logits")
    given = b.cast(logits, FP32, label="logits32") if e.router == "softmax_fp32" else logits
    probs = b.softmax(given, FP32, label="probs")
    best, chosen = top_k(b, probs, e.top_k)
    if e.normalized:
        best = _normalized(b, best)
    weights = best if e.router == "softmax_fp32" else b.cast(best, logits.dtype, label="top_k_weights")
    b.hold(probs)
    return logits, weights, chosen


def _routed_by_groups(
    b: Builder, e: Experts, groups: Groups, flat: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepseekV3TopkRouter.forward: the choice is made without gradient; what it makes lives until forward returns."""
    tokens, wide = flat.shape[0], b.cast(weight, FP32, label="w32")
    logits = b.linear(b.cast(flat, FP32, label="x32"), wide, label="logits")
    scores = b.squash(logits, label="scores")
    corrected = b.plain("corrected", tokens, e.number, dtype=FP32, ins=(scores,))  # by a buffer in float32
    pairs = b.plain("group_pairs", tokens, groups.number, 2, dtype=INT64, ins=(corrected,))
    best = b.plain("group_scores", tokens, groups.number, dtype=FP32, ins=(corrected,))
    group = b.plain("group_idx", tokens, groups.best, dtype=INT64, ins=(best,))
    mask = b.plain("group_mask", tokens, groups.number, dtype=FP32, ins=(group,))
    spread = b.plain("score_mask", tokens, e.number, dtype=FP32, ins=(mask,))
    hidden = b.plain("hidden", tokens, e.number, dtype=DType.boolean, ins=(spread,))
    masked = b.plain("masked", tokens, e.number, dtype=FP32, ins=(corrected, hidden))
    chosen = b.plain("top_k_index", tokens, e.top_k, dtype=INT64, ins=(masked,))
    gathered = Tensor("", (tokens, e.top_k), scores.dtype)
    weights = b.formula("top_k", gathered, scores, chosen, keeps=(chosen,), grads=(Grad(scores, scores.nbytes),))
    if e.normalized:
        weights = _normalized(b, weights, guarded=True)
    scaled = b.scale(weights, label="top_k_scaled")
    b.hold(scores, pairs, best, group, mask, spread, hidden, masked, weights)
    return logits, scaled, chosen


def top_k(b: Builder, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk over the last dimension: values, and indices, which it keeps; the gradient is scattered into zeros."""
    shape = (*scores.shape[:-1], k)
    chosen = b.plain("top_k_index", *shape, dtype=INT64, ins=(scores,))
    values = b.formula(
        "top_k", Tensor("", shape, scores.dtype), scores, keeps=(chosen,), grads=(Grad(scores, scores.logical_bytes),)
    )
    return values, chosen


def _normalized(b: Builder, best: Tensor, *, guarded: bool = False) -> Tensor:
    """`best /= best.sum(-1, keepdim=True)`: what was there is cloned where its gradient needs it (div_)."""
    total = b.formula(
        "top_k_sum", Tensor("", (*best.shape[:-1], 1), best.dtype), best, grads=(Grad(best, best.nbytes),)
    )
    total = b.add_const(total, label="top_k_sum_guarded") if guarded else total
    before = internal(b.name("before"), "clone", best.shape, best.dtype)
    grads = (Grad(best, best.nbytes), Grad(total, best.nbytes, 2 * best.nbytes))
    out = best._replace(base=best.storage)
    return b.formula("normalized", out, best, total, keeps=(before, total), grads=grads)


# -- experts ----------------------------------------------------------------------------------------------------------


def _grouped(b: Builder, e: Experts, setup: Setup, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """grouped_mm_experts_forward: every name that it gives lives until it returns."""
    tokens, hidden = flat.shape
    rows = tokens * e.top_k
    numbers = b.plain("expert_ids", rows, dtype=INT64, ins=(chosen,))
    order = b.plain("perm", rows, dtype=INT64, ins=(chosen,))
    source = b.plain("token_ids", rows, dtype=INT64, ins=(order,))
    x = pick(b, flat, source, rows, hidden, label="selected")
    scale = pick(b, weights.view(rows), order, rows, label="sample_weights")
    counted = INT32 if b.numerics.backend == "cuda" else FP32
    binned = b.plain("histc_input", rows, dtype=counted, ins=(numbers,))
    counts = b.plain("tokens_per_expert", e.number, dtype=counted, ins=(binned,))
    offsets = b.plain("offsets", e.number, dtype=INT32, ins=(counts,))
    gate_up, down = _matrices(b, e, setup, hidden)
    both = grouped_linear(b, x, gate_up, offsets, rows, 2 * e.size, label="gate_up")
    product = gated_halves(b, both)
    d = grouped_linear(b, product, down, offsets, rows, hidden, label="down")
    b.hold(product)
    weighted = b.mul(d, scale.view(rows, 1), label="weighted")
    inverse = b.plain("inv_perm", rows, dtype=INT64)
    b.plain("arange", rows, dtype=INT64, ins=(inverse,))
    restored = pick(b, weighted, inverse, rows, hidden, label="restored")
    b.hold(weighted)
    total = _summed(b, restored, tokens, hidden)
    out = b.cast(total, flat.dtype, label="out")
    b.hold(numbers, order, x, scale, binned, counts, offsets, d, restored, inverse, total)
    return out


def _matrices(b: Builder, e: Experts, setup: Setup, hidden: int) -> tuple[Tensor, Tensor]:
    """The experts' parameters, which are no modules: formats do not pack them."""
    dtype = setup.types.unpacked
    gate_up = b.weight("gate_up_proj", e.number, 2 * e.size, hidden, dtype=dtype)
    return gate_up, b.weight("down_proj", e.number, hidden, e.size, dtype=dtype)


def pick(b: Builder, x: Tensor, index: Tensor, *shape: int, label: str) -> Tensor:
    """`x[index]`: keeps the index; the gradient is added into zeros (index_put_ with accumulate), for which CUDA sorts
    the index: four copies of it (aten/src/ATen/native/cuda/Indexing.cu, index_put_with_sort_kernel)."""
    scratch = 4 * index.nbytes if b.numerics.backend == "cuda" else 0
    grads = (Grad(x, x.logical_bytes, scratch),)
    return b.formula(label, Tensor("", shape, x.dtype), x, index, keeps=(index,), grads=grads)


def grouped_linear(b: Builder, x: Tensor, w: Tensor, offsets: Tensor, *shape: int, label: str) -> Tensor:
    """moe.py, _grouped_mm: the input takes the weight's dtype; autocast does not know the product."""
    x = b.cast(x, w.dtype, label=f"{label}_x")
    name = b.name(label)
    op = GroupedLinear(name=name, ins=(x, w, offsets), out=Tensor(name, shape, w.dtype), site="experts")
    b.ops.append(op)
    return op.out


def gated_halves(b: Builder, both: Tensor) -> Tensor:
    """moe.py, _default_apply_gate."""
    name = b.name("glu")
    out = Tensor(name, (*both.shape[:-1], both.shape[-1] // 2), both.dtype)
    b.ops.append(GatedHalves(name=name, ins=(both,), out=out, site="experts"))
    return out


def _summed(b: Builder, restored: Tensor, tokens: int, hidden: int) -> Tensor:
    """`.view(T, k, H).sum(1)`; CUDA's autocast sums in float32."""
    wide = b.numerics.autocast is not None and b.numerics.backend == "cuda"
    out = Tensor("", (tokens, hidden), FP32 if wide else restored.dtype)
    return b.formula("sum", out, restored, grads=(Grad(restored, restored.numel * out.dtype.size),))
