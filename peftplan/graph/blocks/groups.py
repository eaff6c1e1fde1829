"""Attention within parts of a row: shifted sparse attention (Chen 2023, arXiv:2309.12307, section 3.2).

Mirrors LLaMA-Factory, model/model_utils/longlora.py, llama_sdpa_attention_forward and llama_flash_attention_2_forward:
keys and values of every head, half of the heads rolled by half a part, parts as rows of the batch, and back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import Grad, Tensor
from peftplan.units import DType

if TYPE_CHECKING:
    from peftplan.graph.blocks.attention import Site

Attend = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]


def shifted(b: Builder, site: Site, attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """From per-head q, k, v to the (B, S, N*D) input of the output projection."""
    _check(site)
    heads, dim, groups = site.attention.heads, site.attention.head_dim, site.groups
    rows, part = site.size * groups, site.seq // groups
    if site.repeats > 1:
        k, v = (b.copy(t, *site.full_keys, label=n, grad_copied=True) for t, n in ((k, "k_repeat"), (v, "v_repeat")))
    q, k, v = (_rolled(b, t, n).view(rows, heads, part, dim) for t, n in ((q, "q"), (k, "k"), (v, "v")))
    if mask is not None:
        mask = b.plain("group_mask", rows, 1, part, part, dtype=DType.boolean, ins=(mask,))
    alone = replace(site.attention, kv_heads=heads, rotary_concat=False)
    inner = replace(
        site, attention=alone, size=rows, seq=part, groups=1, use_cache=False, by_head=False, values_by_head=False
    )
    out, _ = attend(b, inner, q, k, v, mask)
    b.hold(q, k, v, *(() if mask is None else (mask,)))
    return _rolled(b, out.view(rows, part, heads, dim), "out", heads_at=2).view(site.size, site.seq, heads * dim)


def _check(site: Site) -> None:
    if site.seq % site.groups:
        raise RequestError(f"--seq-len {site.seq} does not split into {site.groups} parts; use a multiple of them")
    if site.attention.heads % 2:
        heads = site.attention.heads
        raise RequestError(f"shifted attention moves half of the heads, and the model has {heads}; use lora")
    if site.implementation in ("eager", "sdpa_math"):
        raise Unsupported(f"shifted attention with --attention {site.implementation} is not modelled; use sdpa")
    if site.documents > 1 or site.attention.window is not None or site.past:
        raise Unsupported(
            "shifted attention on packed rows, windows or prefixes is not modelled; use --batching padded and a model "
            "without windows"
        )


def _rolled(b: Builder, t: Tensor, label: str, heads_at: int = 1) -> Tensor:
    """`cat((t[first half of the heads], t[second half].roll()))`."""
    half = tuple(size // 2 if axis == heads_at else size for axis, size in enumerate(t.shape))
    with b.scope(f"{label}_shift"):
        first, second = (b.slice(t, *half, label=n) for n in ("first", "second"))
        size = prod(half) * t.dtype.size
        dense = size if b.numerics.backend == "cuda" else 0  # roll_cuda: in_tensor.contiguous()
        rolled = b.formula(
            "roll", Tensor("", half, t.dtype), second, grads=(Grad(second, size, dense),), temporary_bytes=dense
        )
        return b.concat((first, rolled), *t.shape)
