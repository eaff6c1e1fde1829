"""The head and the loss over pieces of a row: logits of every piece are kept, one piece at a time is in fp32.

torchtune 0.6.1, modules/loss/ce_chunked_output_loss.py, CEWithChunkedOutputLoss, and modules/transformer.py,
chunked_output: 8 pieces, each cast to fp32, whose log-softmax stays. litgpt 0.5, model.py (lm_head_chunk_size) and
utils.py, chunked_cross_entropy: pieces of 128 tokens in the dtype they come in. Of several rows in plain fp32 with a
trained head the backward's peak errs low: by 1 % in a model of three layers and 97 words.
"""

from __future__ import annotations

from peftplan.graph.builder import Builder
from peftplan.graph.core import ACTIVATION, Grad, Tensor
from peftplan.graph.ops import Further, Fused, LogSoftmax, NllLoss, internal
from peftplan.units import DType

PIECES, TOKENS = 8, 128
FP32 = DType.float32


def chunked_loss(b: Builder, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """torchtune's: the loss's scalar. Labels are shifted by the recipe, the last of a row is not counted."""
    size, seq, _ = hidden.shape
    with b.marked("loss"):
        targets = b.plain("shift_labels", size, seq, dtype=DType.int64, ins=(labels,))
    widths = _even(seq, PIECES)
    logits = _logits(b, hidden, head, widths)
    with b.marked("loss"):
        counted = b.plain("counted", size, seq, dtype=DType.boolean, ins=(targets,))
        count = b.plain("count", dtype=DType.int64, ins=(counted,))
        parts = [_targets(b, targets, width) for width in widths]
        total: Tensor | None = None
        for scores, part in zip(logits, parts, strict=True):
            loss = _sum_of(b, b.cast(scores, FP32, label="logits32"), part)
            total = loss if total is None else b.add(total, loss, label="total")
        assert total is not None
        mean = b.formula("loss", Tensor("", (), FP32), total, count, keeps=(count,), grads=(Grad(total, FP32.size),))
        b.hold(hidden, targets, *logits, *parts)
    return mean


def split_loss(b: Builder, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """LitGPT's: the loss's scalar."""
    size, seq, _ = hidden.shape
    widths = _pieces_of(seq, TOKENS)
    logits = _logits(b, hidden, head, widths)
    with b.marked("loss"):
        last = logits[-1]
        if widths[-1] > 1:
            logits[-1] = b.slice(last, size, widths[-1] - 1, last.shape[-1], label="but_last")
        else:
            logits.pop()
        rows = [b.copy(t, label="rows") if size > 1 and t.base and t.shape[1] > 1 else t for t in logits]
        parts = [_targets(b, labels, t.shape[1]) for t in rows]
        losses = [_losses_of(b, scores, part) for scores, part in zip(rows, parts, strict=True)]
        counted = b.plain("counted", size * (seq - 1), dtype=DType.boolean, ins=(labels,))
        count = b.plain("count", dtype=DType.int64, ins=(counted,))
        dtype = losses[0].dtype
        together = b.concat(tuple(losses), size * (seq - 1), label="losses")
        total = b.formula("total", Tensor("", (), dtype), together, grads=(Grad(together, 0),))
        mean = b.formula("loss", Tensor("", (), dtype), total, count, keeps=(count,), grads=(Grad(total, dtype.size),))
        b.hold(hidden, *logits, *rows, *parts, *losses)
    return mean


def _even(seq: int, pieces: int) -> list[int]:
    """torch.chunk: pieces of one size but the last, perhaps fewer."""
    return _pieces_of(seq, -(-seq // pieces))


def _pieces_of(seq: int, width: int) -> list[int]:
    return [min(width, seq - start) for start in range(0, seq, width)]


def _logits(b: Builder, hidden: Tensor, head: Tensor, widths: list[int]) -> list[Tensor]:
    """One product for each piece; of several rows each piece is made contiguous first."""
    rows = hidden.shape[0]
    with b.marked("head", "extra"):  # no one module's: PEFT wraps a head that is then called for every piece
        made = []
        for piece in _split(b, hidden, widths):
            x = b.copy(piece, label="piece_rows") if rows > 1 else piece
            made.append(b.linear(x, head, label="lm_head"))
    return made


def _split(b: Builder, x: Tensor, widths: list[int]) -> list[Tensor]:
    """torch.split: views, whose gradients are put together at once."""
    if len(widths) == 1:
        return [x]
    names = [b.name("piece") for _ in widths]
    size, _, hidden = x.shape
    pieces = [Tensor(n, (size, width, hidden), x.dtype, ACTIVATION, base=x.storage)
              for n, width in zip(names, widths, strict=True)]  # fmt: skip
    *firsts, last = pieces
    b.ops.extend(Further(name=t.name, ins=(x,), out=t, site="head", part="extra") for t in firsts)
    grads = (Grad(x, x.logical_bytes),)
    b.ops.append(Fused(name=last.name, ins=(x,), out=last, grads=grads, also=tuple(firsts), site="head", part="extra"))
    return pieces


def _targets(b: Builder, labels: Tensor, width: int) -> Tensor:
    """The labels of a piece, flat: a copy where there are several rows of several tokens."""
    rows = labels.shape[0] * width
    if 1 in (labels.shape[0], width):
        return labels  # a view of it
    return b.plain("piece_labels", rows, dtype=DType.int64, ins=(labels,))


def _log_probs(b: Builder, scores: Tensor) -> Tensor:
    n = b.name("log_softmax")
    out = Tensor(n, (scores.numel // scores.shape[-1], scores.shape[-1]), scores.dtype)
    b.ops.append(LogSoftmax(name=n, ins=(scores,), out=out, site="loss"))
    return out


def _sum_of(b: Builder, scores: Tensor, targets: Tensor) -> Tensor:
    return _nll(b, scores, targets, Tensor("", (), scores.dtype))


def _losses_of(b: Builder, scores: Tensor, targets: Tensor) -> Tensor:
    return _nll(b, scores, targets, Tensor("", (targets.numel,), scores.dtype))


def _nll(b: Builder, scores: Tensor, targets: Tensor, out: Tensor) -> Tensor:
    log_probs = _log_probs(b, scores)
    n = b.name("nll")
    made = out._replace(name=n)
    total = internal(n, "total_weight", (), scores.dtype)
    b.ops.append(NllLoss(name=n, ins=(log_probs, targets), out=made, total_weight=total, site="loss"))
    return made
