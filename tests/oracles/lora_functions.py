"""Unsloth's fused LoRA as fms-acceleration took it over, and its kernels, as functions of torch that run without a GPU:
each allocates, keeps, multiplies and returns what the library's own does (fms-acceleration at 876e2ed,
fused_ops/unsloth_lora/bnb/fast_lora.py, kernels/unsloth/*.py), and dequantizes to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Projection = tuple[Any, Tensor, Tensor, Any]
"""The base layer, A, B, the dropout module."""


def parts(layer: Any) -> Projection:
    """get_lora_parameters."""
    dropout = layer.lora_dropout["default"]
    return layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight, dropout


def whole(base: Any, dtype: torch.dtype) -> Tensor:
    """fast_dequantize: a new weight beside its blocks' constants."""
    constants = torch.empty(base.in_features * base.out_features // 64, dtype=torch.float32)
    weight = torch.empty((base.out_features, base.in_features), dtype=dtype)
    del constants
    return weight


class Fms:
    """Dropped inputs are kept; the adapter's product is a tensor; masks are where those are not zero."""

    @staticmethod
    def forward(x: Tensor, layer: Projection) -> tuple[Tensor, Tensor]:
        """The output, and what is kept besides the input."""
        base, a, b, dropout = layer
        weight = whole(base, x.dtype)
        out = x @ weight.t()
        del weight
        dropped = dropout(x)
        out += (dropped @ a.to(x.dtype).t()) @ b.to(x.dtype).t()
        return out, dropped

    @staticmethod
    def weights(dy: Tensor, x: Tensor, dropped: Tensor, layer: Projection) -> tuple[Tensor, Tensor]:
        _, a, b, _ = layer
        a, b = a.to(x.dtype), b.to(x.dtype)
        return (dropped.t() @ (dy @ b)).t(), ((a @ dropped.t()) @ dy).t()

    @staticmethod
    def add(dx: Tensor | None, x: Tensor, dy: Tensor, layer: Projection, kept: Tensor, out: Tensor | None) -> Tensor:
        base, a, b, _ = layer
        weight = whole(base, x.dtype)
        if dx is None:
            dx = torch.matmul(dy, weight, out=out) if out is not None else dy @ weight
        else:
            dx += dy @ weight
        del weight
        dx += (kept != 0) * (dy @ b.to(x.dtype) @ a.to(x.dtype))
        return dx


class QKV(torch.autograd.Function):  # type: ignore[misc]
    """LoRA_QKV."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Any, *params: Tensor) -> Any:
        del params
        shape = x.shape
        flat = x.view(-1, shape[-1])
        outs, kept = [], []
        for layer in layers:
            out, dropped = Fms.forward(flat, layer)
            outs.append(out.view(*shape[:-1], -1))
            kept.append(dropped)
        ctx.layers = layers
        ctx.save_for_backward(x, *kept)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *kept = ctx.saved_tensors
        shape = x.shape
        flat = x.view(-1, shape[-1])
        grads = tuple(g.reshape(-1, g.shape[-1]) for g in grads)
        made = [Fms.weights(g, flat, k, layer) for g, k, layer in zip(grads, kept, ctx.layers, strict=True)]
        dx = None
        for g, k, layer in zip(grads, kept, ctx.layers, strict=True):
            dx = Fms.add(dx, flat, g, layer, k, flat if dx is None else None)
        assert dx is not None
        return (dx.view(shape), None, *(t for pair in made for t in pair))


class Single(torch.autograd.Function):  # type: ignore[misc]
    """LoRA_W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, *params: Tensor) -> Tensor:
        del params
        shape = x.shape
        out, dropped = Fms.forward(x.reshape(-1, shape[-1]), layer)
        ctx.layer = layer
        ctx.save_for_backward(x, dropped)
        return out.view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, dropped = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        da, db = Fms.weights(dy, flat, dropped, ctx.layer)
        dx = Fms.add(None, flat, dy, ctx.layer, dropped, None)
        return dx.view(x.shape), None, da, db


class FastCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """kernels/unsloth/cross_entropy_loss.py, for vocabularies of one block."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(scores.shape[0], dtype=torch.float32)
        ctx.save_for_backward(scores, torch.empty_like(losses), targets)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del grads
        return ctx.saved_tensors[0], None


def fast_causal_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """FastForCausalLMLoss."""
    logits = logits.float()
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    shift_logits = shift_logits.view(-1, vocab_size)
    shift_labels = shift_labels.view(-1)
    loss = FastCrossEntropy.apply(shift_logits, shift_labels)
    count = torch.count_nonzero(shift_labels != -100)
    return loss.sum() / count


class FastRope(torch.autograd.Function):  # type: ignore[misc]
    """kernels/unsloth/rope_embedding.py, for queries or keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.cos, ctx.sin = cos, sin
        batch, seq, heads, dim = q.shape
        return q.view(batch * seq, heads * dim).view(batch, seq, heads, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del ctx
        dy = grads[0]
        return dy.reshape(dy.shape[0] * dy.shape[1], -1).view(dy.shape), None, None


def fast_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q = FastRope.apply(q.transpose(1, 2), cos, sin).transpose(1, 2)
    k = FastRope.apply(k.transpose(1, 2), cos, sin).transpose(1, 2)
    return q, k
