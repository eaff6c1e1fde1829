"""Llama-shaped decoders as ops, mirroring transformers 5.23 line by line.

modeling_llama.py, modeling_mistral.py, modeling_qwen2.py, modeling_qwen3.py, modeling_gemma.py, modeling_phi3.py,
modeling_smollm3.py, modeling_mixtral.py, modeling_qwen2_moe.py, modeling_qwen3_moe.py,
modeling_granite.py: LlamaDecoderLayer.forward and its siblings differ by the switches of `Arch` only. `hold` marks the
Python locals that outlive their last use.
"""

from __future__ import annotations

from dataclasses import replace

from peftplan.arch.core import Arch, Experts, Layer
from peftplan.graph.blocks.ends import buffers, entrance, final_norm, head
from peftplan.graph.blocks.experts import sparse
from peftplan.graph.blocks.latent_attention import latent_attention
from peftplan.graph.blocks.mlp import gated
from peftplan.graph.blocks.modules import rms_norm
from peftplan.graph.blocks.self_attention import self_attention
from peftplan.graph.blocks.setup import Setup, Shared
from peftplan.graph.builder import Builder
from peftplan.graph.core import INPUT, Graph, Region, Tensor
from peftplan.units import DType


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
    first, shared = entrance(arch, setup, ids)
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
    regions.append(final_norm(arch, setup, regions[-1].exit.dtype))
    regions.append(head(arch, setup, labels, regions[-1].exit))
    return Graph(regions=tuple(regions), inputs=inputs, buffers=buffers(arch, setup))


def _layer(arch: Arch, layer: Layer, setup: Setup, shared: Shared, dtype: DType, index: int, count: int) -> Region:
    """LlamaDecoderLayer.forward."""
    b = Builder(setup.numerics, mesh=setup.mesh)
    x = Tensor("hidden", (setup.batch.size, setup.batch.seq, arch.hidden), dtype)
    h = rms_norm(b, arch, setup, x, "input_layernorm")
    with b.scope("self_attn"):
        attend = self_attention if layer.attention.latent is None else latent_attention
        o, weights = attend(b, arch, layer.attention, setup, shared, h)
    b.hold(h)
    o = b.dropout(o, layer.residual_dropout, label="resid_attn_dropout")
    mid = _joined(b, arch, x, o, "attn")
    h = rms_norm(b, arch, setup, mid, "post_attention_layernorm")
    with b.scope("mlp"):
        d = sparse(b, layer.mlp, setup, h) if isinstance(layer.mlp, Experts) else gated(b, layer.mlp, setup, h)
    b.hold(h)
    d = b.dropout(d, layer.residual_dropout, label="resid_mlp_dropout")
    out = _joined(b, arch, mid, d, "mlp")
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


def _joined(b: Builder, arch: Arch, residual: Tensor, branch: Tensor, label: str) -> Tensor:
    """`residual + branch`, or GraniteDecoderLayer's `residual + branch * residual_multiplier`."""
    if not arch.multiplies:
        return b.add(residual, branch, label=f"residual_{label}")
    total = b.add(residual, b.scale(branch, label=f"{label}_multiplied"), label=f"residual_{label}")
    b.hold(branch)
    return total


def module_order(name: str) -> tuple[int, bool, bool]:
    """Sort key that puts a layer's parameters in the order of `model.parameters()`: attention, feed-forward, norms;
    Phi-3 makes its output projection before the fused one."""
    room = 0 if name.startswith("self_attn.") else 1 if name.startswith("mlp.") else 2
    return room, "norm." in name, "qkv_proj" in name
