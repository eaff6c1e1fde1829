"""The causal language model's loss as ops, in the shapes transformers gave it over its releases.

What differs is who holds fp32 logits, and whether logits or labels are shifted:

- `shifted_labels`: ForCausalLMLoss since 4.50 (loss/loss_utils.py at 5.23.0): labels are padded and shifted,
  logits are cast to fp32 whole. 10 bytes a logit at the end of the forward on a half-precision head.
- `shifted_logits`: ForCausalLMLoss of 4.46 to 4.49: the fp32 copy is sliced and made contiguous. 14 bytes.
- `shifted_fp32_logits`: until 4.45 each model's own forward: `logits = logits.float()` replaces the
  half-precision logits, which the model then returns in fp32; their slice is made contiguous. 12 bytes.

- `fused_head`: TRL since 1.x replaces head and loss by one function that keeps no logits (`graph/fused_head.py`).
  Every token but each row's first is taken for a target: errs high where prompts are masked out.

- `chunked`, `split`: torchtune and LitGPT compute the head and the loss piece by piece (`graph/chunked_loss.py`).

The byte counts of the others are those of the peaks measured by foundation-model-stack/fms-acceleration (A100,
transformers 4.48.1 and 4.45, 2024-05 to 2025-02) and fitcheck-llm 0.3.1 (T4, transformers 5.0.0 and 5.17.0, 2026-09).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ACTIVATION, Tensor
from peftplan.graph.fused_head import FusedHead, PickRows
from peftplan.graph.ops import LogSoftmax, NllLoss, internal
from peftplan.units import DType

LossStyle = Literal["shifted_labels", "shifted_logits", "shifted_fp32_logits", "fused_head", "chunked", "split"]
STYLES: tuple[LossStyle, ...] = get_args(LossStyle)
FP32 = DType.float32


Criterion = Callable[[Builder, Tensor, Tensor], Tensor]
"""From fp32 scores and targets, one row a token, to the scalar loss."""


def cross_entropy(b: Builder, scores: Tensor, targets: Tensor) -> Tensor:
    """torch.nn.functional.cross_entropy."""
    log_probs = Tensor("log_softmax", (scores.numel // scores.shape[-1], scores.shape[-1]), FP32)
    b.ops.append(LogSoftmax(name="log_softmax", ins=(scores,), out=log_probs, site="loss"))
    loss = Tensor("loss", (), FP32, ACTIVATION)
    total = internal("loss", "total_weight", (), FP32)
    b.ops.append(NllLoss(name="loss", ins=(log_probs, targets), out=loss, total_weight=total, site="loss"))
    return loss


def causal_lm_loss(
    b: Builder, logits: Tensor, labels: Tensor, hidden: Tensor, style: LossStyle, *, criterion: Criterion
) -> Tensor:
    """The loss of (B, S, V) logits for (B, S) labels. Returns its scalar."""
    with b.marked("loss"):
        logits32 = b.cast(logits, FP32, label="logits32")
        if style == "shifted_labels":
            scores, targets, held = logits32, *shifted_labels(b, labels)
        else:
            scores, targets, held = *_shifted_logits(b, logits32, labels), labels
        loss = criterion(b, scores, targets)
        b.hold(logits32, scores, hidden, held)
    return loss


def fused_head_loss(b: Builder, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The loss of (B, S, H) hidden states and a (V, H) head without (B, S, V) logits. Returns its scalar."""
    size, seq, width = hidden.shape
    if seq < 2:
        raise RequestError("loss.style: a fused head needs at least two tokens; give --seq-len 2 or more")
    rows = size * (seq - 1)
    with b.marked("loss"):
        before = b.slice(hidden, size, seq - 1, width, label="but_last")
        mask = b.plain("label_mask", rows, dtype=DType.boolean, ins=(labels,))
        picked = Tensor(b.name("rows"), (rows, width), hidden.dtype)
        b.ops.append(PickRows(name=picked.name, ins=(before, mask), out=picked, site="loss"))
        targets = b.plain("targets", rows, dtype=DType.int64, ins=(labels, mask))
        log_probs = Tensor(b.name("log_probs"), (rows,), FP32)
        b.ops.append(
            FusedHead(
                name=log_probs.name,
                ins=(picked, head, targets),
                out=log_probs,
                compute=b.numerics.autocast or hidden.dtype,
                log_z=internal(log_probs.name, "log_z", (rows,), FP32),
                entropy=internal(log_probs.name, "entropy", (rows,), FP32),
                site="head",
                part="extra",  # no module of its own: PEFT wraps a head that this function then bypasses
            )
        )
        loss = b.mean_last(log_probs, label="loss")
        b.hold(hidden, picked, mask, log_probs)
    return loss


def returned_logits(style: LossStyle, logits: Tensor) -> str:
    """The name of the logits in the model's output."""
    return "logits32" if style == "shifted_fp32_logits" and logits.dtype is not FP32 else logits.name


def shifted_labels(b: Builder, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`pad(labels, (0, 1))[..., 1:].contiguous()`: the targets, and the padded labels that stay a local."""
    size, seq = labels.shape
    padded = b.plain("padded_labels", size, seq + 1, dtype=DType.int64, ins=(labels,))
    if size == 1:  # one row without its first label is contiguous already
        return padded.view(seq), padded
    return b.plain("shift_labels", size * seq, dtype=DType.int64, ins=(padded,)), padded


def _shifted_logits(b: Builder, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`logits[..., :-1, :].contiguous()` and `labels[..., 1:].contiguous()`."""
    size, seq, vocab = logits.shape
    if seq < 2:
        raise RequestError("loss.style: shifted logits need at least two tokens; give --seq-len 2 or more")
    part = b.slice(logits, size, seq - 1, vocab, label="but_last")
    targets = b.plain("shift_labels", size * (seq - 1), dtype=DType.int64, ins=(labels,))
    return b.copy(part, label="shift_logits"), targets
