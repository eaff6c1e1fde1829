"""The fused head against TRL's own function: what it keeps, and its FLOPs."""

from __future__ import annotations

from typing import Any

import pytest

from peftplan import estimate
from peftplan.errors import RequestError
from peftplan.graph.blocks.loss import fused_head_loss
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Tensor
from peftplan.units import DType

B, S, H, V = 3, 17, 48, 97


def ops(*, trains_head: bool) -> tuple[int, int, int]:
    """(bytes kept, FLOPs forward, FLOPs backward) of our head and loss."""
    b = Builder(Numerics(backend="cpu"))
    hidden = Tensor("h", (B, S, H), DType.float32)
    head = Tensor("@lm_head.weight", (V, H), DType.float32, "weight", trains_head)
    fused_head_loss(b, hidden, head, Tensor("labels", (B, S), DType.int64))
    need = {"h"} | ({head.name} if trains_head else set())
    kept: dict[str, int] = {}
    for op in b.ops:
        if any(t.name in need for t in op.ins) and op.differentiable:
            need.add(op.out.name)
        kept.update({t.name: t.nbytes for t in op.saved(need) if not t.is_param})
    return sum(kept.values()), sum(op.flops() for op in b.ops), sum(op.grad_flops(need) for op in b.ops)


def _addmm_flops(_: Any, a: tuple[int, int], b: tuple[int, int], **__: Any) -> int:
    """The product in place, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.trace
@pytest.mark.parametrize("trains_head", [False, True])
def test_it_keeps_and_computes_what_trl_does(trains_head: bool) -> None:
    import torch
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.flop_counter import FlopCounterMode
    from trl.kernels import ChunkedLogProbFunction

    hidden = torch.randn(B, S, H, requires_grad=True)
    head = torch.randn(V, H, requires_grad=trains_head)
    labels = torch.randint(V, (B, S))
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() != head.data_ptr():
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(keep, lambda t: t), FlopCounterMode(display=False) as forward:
        mask = labels[:, 1:] != -100
        targets = labels[:, 1:][mask]
        outputs = ("log_probs", "entropy", "is_top1")
        picked = hidden[:, :-1][mask]
        log_probs, *_ = ChunkedLogProbFunction.apply(picked, head, None, targets, 1.0, 32768, None, 1.0, outputs)
        loss = -log_probs.sum() / (B * (S - 1))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as backward:
        loss.backward()
    assert ops(trains_head=trains_head) == (
        sum(kept.values()),
        forward.get_total_flops(),
        backward.get_total_flops(),
    )


def test_it_saves_the_logits_of_a_large_vocabulary() -> None:
    common: dict[str, Any] = {"model": "llama-3.1-8b", "micro_batch": 2, "seq_len": 2048, "recompute": "full"}
    plain = estimate(**common, set={"loop.outputs_until": "loss"})
    fused = estimate(**common, set={"loss.style": "fused_head", "loop.outputs_until": "loss"})
    assert fused.memory.peak_bytes < plain.memory.peak_bytes - 2 * 2048 * 128256 * 4
    assert fused.parameters == plain.parameters


def test_one_token_has_nothing_to_predict() -> None:
    with pytest.raises(RequestError, match="at least two tokens"):
        estimate(model="llama-7b", seq_len=1, set={"loss.style": "fused_head"})
