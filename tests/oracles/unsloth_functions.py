"""Unsloth's functions as functions of torch that run without a GPU: each allocates, keeps, multiplies and returns what
its own does on one (unsloth and unsloth_zoo 2026.10.9: kernels/fast_lora.py, kernels/rope_embedding.py,
fused_losses/fused_linear.py), and dequantizes to nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.oracles.kernel_functions import RMSNorm


class Part(NamedTuple):
    """One adapted projection; `buffer` is where the forward dequantizes, None for a weight that is not packed."""

    base: Any
    a: Tensor
    b: Tensor
    p: float
    buffer: Tensor | None

    def held(self) -> Tensor:
        if self.buffer is None:
            weight: Tensor = self.base.weight
            return weight
        shape = self.base.out_features, self.base.in_features
        return self.buffer[: shape[0] * shape[1]].view(shape)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """fast_dequantize without the buffer."""
        if self.buffer is None:
            return self.held()
        constants = torch.empty(self.base.in_features * self.base.out_features // 64, dtype=torch.float32)
        weight = torch.empty((self.base.out_features, self.base.in_features), dtype=dtype)
        del constants
        return weight


def multiply(x: Tensor, part: Part) -> tuple[Tensor, Tensor | None]:
    """matmul_lora, or _matmul_lora_ext with native_dropout: the output and dropout's mask."""
    dropped, mask = x, None
    if part.p:
        dropped, mask = torch.empty_like(x), torch.empty(x.shape, dtype=torch.bool)
    weight = part.whole(x.dtype) if part.p else part.held()
    out = x @ weight.t()
    del weight
    torch.addmm(out, dropped @ part.a.to(x.dtype).t(), part.b.to(x.dtype).t(), out=out)
    return out, mask


def weights(dy: Tensor, x: Tensor, part: Part, inner: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of A and B; `inner` is dy B."""
    dropped = x if mask is None else torch.empty_like(x)
    a = part.a.to(x.dtype)
    da, db = torch.empty_like(a.t()), torch.empty_like(part.b.to(x.dtype).t())
    torch.addmm(da, dropped.t(), inner, beta=0, out=da)
    torch.addmm(db, a @ dropped.t(), dy, beta=0, out=db)
    return da.t(), db.t()


def onto(dx: Tensor | None, dy: Tensor, part: Part, inner: Tensor, mask: Tensor | None, over: Tensor | None) -> Tensor:
    """The input's gradient with this projection's share."""
    weight = part.whole(dy.dtype)
    if dx is not None:
        torch.addmm(dx, dy, weight, out=dx)
    else:
        dx = torch.matmul(dy, weight, out=over) if over is not None else dy @ weight
    del weight
    a = part.a.to(dy.dtype)
    if mask is None:
        return torch.addmm(dx, inner, a, out=dx)
    product = inner @ a
    dx += torch.empty_like(product)
    return dx


class QKV(torch.autograd.Function):  # type: ignore[misc]
    """LoRA_QKV."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[Part, ...], *params: Tensor) -> Any:
        del params
        flat = x.view(-1, x.shape[-1])
        made = [multiply(flat, part) for part in layers]
        ctx.layers = layers
        ctx.save_for_backward(x, *(mask for _, mask in made))
        return tuple(out.view(*x.shape[:-1], -1) for out, _ in made)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *masks = ctx.saved_tensors
        flat = x.view(-1, x.shape[-1])
        grads = tuple(g.reshape(-1, g.shape[-1]) for g in grads)
        inners = [g @ part.b.to(x.dtype) for g, part in zip(grads, ctx.layers, strict=True)]
        each = list(zip(grads, ctx.layers, inners, masks, strict=True))
        made = [weights(g, flat, part, inner, mask) for g, part, inner, mask in each]
        dx = None
        for g, part, inner, mask in each:
            dx = onto(dx, g, part, inner, mask, flat)
        assert dx is not None
        return (dx.view(x.shape), None, *(t for pair in made for t in pair))


class Single(torch.autograd.Function):  # type: ignore[misc]
    """LoRA_W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part, *params: Tensor) -> Tensor:
        del params
        out, mask = multiply(x.reshape(-1, x.shape[-1]), part)
        ctx.part = part
        ctx.save_for_backward(x, mask)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, mask = ctx.saved_tensors
        flat, dy = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        inner = dy @ ctx.part.b.to(x.dtype)
        da, db = weights(dy, flat, ctx.part, inner, mask)
        return onto(None, dy, ctx.part, inner, mask, None).view(x.shape), None, da, db


class Mlp(torch.autograd.Function):  # type: ignore[misc]
    """LoRA_MLP."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[Part, Part, Part], *params: Tensor) -> Tensor:
        del params
        gate, up, down = layers
        flat = x.view(-1, x.shape[-1])
        e, gate_mask = multiply(flat, gate)
        g, up_mask = multiply(flat, up)
        h = torch.empty_like(e)
        out, down_mask = multiply(h, down)
        ctx.layers = layers
        ctx.save_for_backward(x, e, g, gate_mask, up_mask, down_mask)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up, down = ctx.layers
        x, e, g, gate_mask, up_mask, down_mask = ctx.saved_tensors
        flat, dy = x.view(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        if down_mask is None:
            dw = dy @ down.held()
            torch.addmm(dw, dy @ down.b.to(x.dtype), down.a.to(x.dtype), out=dw)
        else:
            dw = dy @ down.whole(x.dtype)
            product = (dy @ down.b.to(x.dtype)) @ down.a.to(x.dtype)
            dw += torch.empty_like(product)
            del product
        made_down = weights(dy, dw, down, dy @ down.b.to(x.dtype), down_mask)
        up_inner, gate_inner = g @ up.b.to(x.dtype), e @ gate.b.to(x.dtype)
        made_up = weights(g, flat, up, up_inner, up_mask)
        made_gate = weights(e, flat, gate, gate_inner, gate_mask)
        dx = onto(None, g, up, up_inner, up_mask, flat)
        dx = onto(dx, e, gate, gate_inner, gate_mask, None)
        return (dx.view(x.shape), None, *made_gate, *made_up, *made_down)


class Rope(torch.autograd.Function):  # type: ignore[misc]
    """Fast_RoPE_Embedding_QK_Positions."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        ctx.table = cos, sin
        return q.view(q.shape), k.view(k.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del ctx
        made = [torch.empty_like(g.transpose(1, 2), memory_format=torch.contiguous_format) for g in grads]
        return (*(g.transpose(1, 2) for g in made), None, None)


class Loss(torch.autograd.Function):  # type: ignore[misc]
    """fused_linear_ce: the rows' gradient is made in the forward, and scaled into a new tensor in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, tile_bytes: int) -> Tensor:
        made = torch.zeros_like(x)
        losses = torch.empty(targets.shape[0], dtype=torch.float32)
        mask = targets != -100
        tile = torch.empty(tile_bytes - 2 * x.shape[0] * head.shape[0], dtype=torch.uint8)
        torch.mm(x @ head.t(), head, out=made)
        ctx.save_for_backward(made)
        del mask, tile, head
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del grads
        return torch.empty_like(ctx.saved_tensors[0]), None, None, None


__all__ = ["QKV", "Loss", "Mlp", "Part", "RMSNorm", "Rope", "Single"]
