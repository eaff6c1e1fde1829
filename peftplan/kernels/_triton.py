"""Norms, rotary embeddings, gated products and losses as Triton kernels keep them: the same in Liger, in Unsloth and in
what took over Unsloth's."""

from __future__ import annotations

from peftplan.arch.core import Attention
from peftplan.graph.blocks.kernels import Layout, Make, Pair
from peftplan.graph.builder import Builder
from peftplan.graph.core import ACTIVATION, Grad, Op, Tensor
from peftplan.graph.ops import Further, Fused, internal
from peftplan.units import DType

FP32 = DType.float32
MULTIPROCESSORS = 132
"""Of an H100 (NVIDIA H100 datasheet, 2023-03), which has more than smaller GPUs: sums of a trained norm's gradient err
high there, by less than 2 MB."""


def rms_norm(b: Builder, x: Tensor, weight: Tensor, *, trains: bool, fresh: bool = False) -> Tensor:
    """Keeps x and one fp32 number a row; the gradient of x is written over the incoming one unless it is `fresh`.
    `trains`: whether the kernel has a gradient for the weight, summed in fp32 by every multiprocessor for itself."""
    n = b.name("out")
    rows = internal(n, "rstd", (x.numel // x.shape[-1],), FP32)
    grads: tuple[Grad, ...] = (Grad(x, x.nbytes if fresh else 0),)
    if trains:
        programs = 1 if b.numerics.backend == "cpu" else MULTIPROCESSORS
        sums = (programs + (weight.dtype is not FP32)) * weight.numel * FP32.size
        grads = (Grad(weight, weight.logical_bytes, sums), *grads)
    return emit(
        b, Fused(name=n, ins=(x, weight), out=Tensor(n, x.shape, x.dtype), keeps=(x, weight, rows), grads=grads,
                 temporary_bytes=rows.nbytes, site="norm")
    )  # fmt: skip


def rotate(b: Builder, a: Attention, q: Tensor, k: Tensor, table: Pair, *, by_head: Layout) -> Pair:
    """Queries and keys turned where they are, and gradients too; what lies otherwise is copied first."""
    if a.fused_qkv:
        q, k = b.copy(q, label="q_dense"), b.copy(k, label="k_dense")
    k_name, q_name = b.name("k_rope"), b.name("q_rope")
    k_out, q_out = k._replace(name=k_name, base=k.storage), q._replace(name=q_name, base=q.storage)
    ins = (q, k, *table)
    b.ops.append(Further(name=k_name, ins=ins, out=k_out))
    grads = (
        Grad(q, q.logical_bytes if by_head[0] else 0),
        Grad(k, k.logical_bytes) if by_head[1] else Grad(k, 0, 0, k_out),
    )
    emit(b, Fused(name=q_name, ins=ins, out=q_out, keeps=table, grads=grads, also=(k_out,)))
    return q_out, k_out


def rotate_each(b: Builder, a: Attention, q: Tensor, k: Tensor, table: Pair, *, by_head: Layout) -> Pair:
    """The same as one function for queries and one for keys."""
    del a
    q_out, k_out = (
        _turned(b, t, n, table, copied=c) for t, n, c in zip((q, k), ("q_rope", "k_rope"), by_head, strict=True)
    )
    return q_out, k_out


def _turned(b: Builder, t: Tensor, label: str, table: Pair, *, copied: bool) -> Tensor:
    n = b.name(label)
    out = t._replace(name=n, base=t.storage)
    grads = (Grad(t, t.logical_bytes if copied else 0),)
    return emit(b, Fused(name=n, ins=(t, *table), out=out, keeps=table, grads=grads))


def glu(b: Builder, gate: Make, up: Make) -> Tensor:
    """act(gate) * up: keeps both, and writes their gradients over them."""
    return product(b, gate(), up())


def product(b: Builder, gate: Tensor, up: Tensor) -> Tensor:
    n = b.name("glu")
    grads = (Grad(gate, gate.logical_bytes, 0, gate), Grad(up, up.logical_bytes, 0, up))
    return emit(b, Fused(name=n, ins=(gate, up), out=Tensor(n, up.shape, up.dtype), keeps=(gate, up), grads=grads))


def emit(b: Builder, op: Op) -> Tensor:
    b.ops.append(op)
    return op.out


WIDEST = 65536
"""Columns that one program of Unsloth's takes; wider vocabularies are reduced in parts."""


def fast_cross_entropy(b: Builder, scores: Tensor, targets: Tensor) -> Tensor:
    """Fast_CrossEntropyLoss and the mean of what it returns: keeps the scores, over which it writes their gradient,
    one fp32 number a row and the targets."""
    width = scores.shape[-1]
    rows = scores.numel // width
    n = b.name("losses")
    log_z = internal(n, "logsumexp", (rows,), FP32)
    parts = -(-width // WIDEST)
    wide = parts * log_z.nbytes if parts > 1 else 0
    losses = emit(
        b, Fused(name=n, ins=(scores, targets), out=Tensor(n, (rows,), FP32), keeps=(scores, log_z, targets),
                 grads=(Grad(scores, scores.nbytes, 0, scores),), temporary_bytes=wide + log_z.nbytes, site="loss")
    )  # fmt: skip
    counted = b.plain("counted", rows, dtype=DType.boolean, ins=(targets,))
    count = b.plain("count", dtype=DType.int64, ins=(counted,))
    scalar = Tensor("", (), FP32, ACTIVATION)
    total = b.formula("total", scalar, losses, grads=(Grad(losses, 0),))
    loss = b.formula("loss", scalar, total, count, keeps=(count,), grads=(Grad(total, FP32.size),))
    b.hold(losses)
    return loss
