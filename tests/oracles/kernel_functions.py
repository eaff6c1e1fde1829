"""What Triton kernels do to memory, as functions of torch that run without a GPU: each allocates, keeps, copies and
returns what the library's own function does (liger-kernel 0.8.5, ops/*.py), and computes nothing between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutputWithPast


class RMSNorm(torch.autograd.Function):  # type: ignore[misc]
    """ops/rms_norm.py: one program on the CPU, so sums of the weight's gradient have one row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        shape = x.shape
        x = x.contiguous().view(-1, shape[-1])
        y = torch.empty_like(x)
        ctx.save_for_backward(x, weight, torch.empty(x.shape[0], dtype=torch.float32))
        return y.view(*shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dy = grads[0].contiguous()
        _, weight, _ = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return dy, None
        sums = torch.empty((1, weight.shape[0]), dtype=torch.float32)
        return dy, sums.sum(dim=0).to(weight.dtype)


class Rope(torch.autograd.Function):  # type: ignore[misc]
    """ops/rope.py."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q, k = (t.transpose(1, 2).contiguous() for t in (q, k))
        ctx.save_for_backward(cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del ctx
        dq, dk = grads
        dq = dq.transpose(1, 2).contiguous()
        dk = dk.transpose(1, 2).contiguous()
        return dq.transpose(1, 2), dk.transpose(1, 2), None, None


class GatedProduct(torch.autograd.Function):  # type: ignore[misc]
    """ops/swiglu.py, ops/geglu.py."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del grads
        return ctx.saved_tensors


class CrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """ops/cross_entropy.py."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor) -> Tensor:
        losses = torch.zeros(scores.shape[0], dtype=scores.dtype)
        mask = targets != -100
        assert (targets * mask).max() is not None
        ctx.save_for_backward(scores.detach())
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del grads
        return ctx.saved_tensors[0], None


class FusedLinearCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """ops/fused_linear_cross_entropy.py, on a device without in-place products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        tokens, width = x.shape
        factor = -(-weight.shape[0] // width)
        chunk = min(tokens, 1 << (-(-tokens // factor) - 1).bit_length())
        grad_x = torch.zeros_like(x)
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        losses = torch.zeros(tokens, dtype=torch.float32)
        mask = target != -100
        for start in range(0, tokens, chunk):
            part = x[start : start + chunk]
            logits = part @ weight.t()
            grad_x[start : start + chunk] = logits @ weight
            if grad_weight is not None:
                grad_weight += torch.mm(logits.t(), part).float()
            del logits
        loss = losses.sum()
        del mask
        ctx.save_for_backward(grad_x.detach(), None if grad_weight is None else grad_weight.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del grads
        return (*ctx.saved_tensors, None)


def fused_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """transformers/model/loss_utils.py, LigerForCausalLMLoss."""
    labels = functional.pad(labels, (0, 1), value=-100)
    targets = labels[..., 1:].contiguous().view(-1)
    loss: Tensor = FusedLinearCrossEntropy.apply(hidden.view(-1, hidden.shape[-1]), head, targets)
    return loss


def fused_forward(model: Any, **batch: Any) -> CausalLMOutputWithPast:
    """transformers/model/llama.py, lce_forward in training: no logits."""
    labels = batch.pop("labels")
    outputs = model.model(**batch)
    hidden = outputs[0]
    head = getattr(model.lm_head, "base_layer", model.lm_head)
    loss = fused_loss(hidden, head.weight, labels)
    return CausalLMOutputWithPast(loss=loss, logits=None, past_key_values=outputs.past_key_values)
