"""Cost rules of the ops: what each keeps for backward, what its backward makes, what it computes.

Each class mirrors one autograd formula (torch/tools/autograd/derivatives.yaml, torch 2.13, and
torch/csrc/autograd/FunctionsManual.cpp) or one fused kernel; the docstring names it. `need` holds the names of values
that require a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.units import DType


def _wants(need: Need, *tensors: Tensor) -> bool:
    return any(t.name in need for t in tensors)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Linear(Op):
    """y = x W^T (+ b): `mm` or `addmm`. ins = (x, W[, b]); x is flattened to two dimensions.

    Keeps x where W trains and W where x needs a gradient (mm: self, mat2). The weight's gradient is computed first.
    """

    def flops(self) -> int:
        return 2 * self.ins[0].numel * self.out.shape[-1]

    def grad_flops(self, need: Need) -> int:
        return self.flops() * ((self.ins[0].name in need) + (self.ins[1].name in need))

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        x, w = self.ins[0], self.ins[1]
        return ((x,) if w.name in need else ()) + ((w,) if x.name in need else ())

    def backward(self, need: Need) -> tuple[Grad, ...]:
        x, w, *bias = self.ins
        size = self.out.dtype.size
        grads = [Grad(b, b.numel * size) for b in bias if b.name in need]
        if w.name in need:
            grads.append(Grad(w, w.numel * size))
        if x.name in need:
            grads.append(Grad(x, x.numel * size))
        return tuple(grads)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class MatMul(Op):
    """Batched a @ b: `bmm`. ins = (a, b); `inner` is the contracted size. Keeps each where the other needs."""

    inner: int

    def flops(self) -> int:
        return 2 * self.out.numel * self.inner

    def grad_flops(self, need: Need) -> int:
        return self.flops() * sum(t.name in need for t in self.ins)

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        a, b = self.ins
        return ((a,) if b.name in need else ()) + ((b,) if a.name in need else ())

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple(Grad(t, t.nbytes) for t in reversed(self.ins) if t.name in need)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Mul(Op):
    """Elementwise a * b with broadcasting and type promotion. Keeps each where the other needs a gradient."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        a, b = self.ins
        return ((a,) if b.name in need else ()) + ((b,) if a.name in need else ())

    def backward(self, need: Need) -> tuple[Grad, ...]:
        full = self.out.nbytes
        return tuple(Grad(t, full) for t in self.ins if t.name in need)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Div(Op):
    """Elementwise a / b. Keeps b where a needs; a and b where b needs (div: self, other)."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        a, b = self.ins
        if b.name in need:
            return (a, b)
        return (b,) if a.name in need else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        a, b = self.ins
        full = self.out.nbytes
        grads = [Grad(a, full)] if a.name in need else []
        if b.name in need:
            grads.append(Grad(b, full, 2 * full))
        return tuple(grads)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Add(Op):
    """a + b (add, sub): keeps nothing; hands the incoming gradient on to both."""

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple(Grad(t, 0) for t in self.ins if t.name in need)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class AddConst(Op):
    """a + constant: keeps nothing; hands the incoming gradient on."""

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple(Grad(t, 0) for t in self.ins if t.name in need)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Scale(Op):
    """a * constant: keeps nothing; the gradient is scaled into a new tensor."""

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple(Grad(t, self.out.nbytes) for t in self.ins if t.name in need)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Cast(Op):
    """`.to(dtype)`: a new tensor, keeps nothing; the gradient is cast back."""

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple(Grad(t, t.numel * t.dtype.size) for t in self.ins if t.name in need)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class WeightCast(Op):
    """Autocast's copy of a weight. Of a trained fp32 weight it is cached until autocast ends with the forward
    (aten/src/ATen/autocast_mode.cpp, cached_cast: fp32 leaves that require a gradient)."""

    @property
    def cached(self) -> bool:
        weight = self.ins[0]
        return weight.trainable and weight.dtype is DType.float32

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple(Grad(t, t.numel * t.dtype.size) for t in self.ins if t.name in need)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Copy(Op):
    """A contiguous copy (clone, cat of one, repeat_kv's reshape): keeps nothing.

    `grad_copied` says whether the gradient is made anew (a sum over repeats, a copy) or handed on as a view.
    """

    grad_copied: bool = False

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple(Grad(t, t.nbytes if self.grad_copied else 0) for t in self.ins if t.name in need)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class View(Op):
    """A view of another layout: no bytes forward; `grad_copied` where its gradient comes back non-contiguous."""

    grad_copied: bool = False

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple(Grad(t, t.nbytes if self.grad_copied else 0) for t in self.ins if t.name in need)

    def moved_bytes(self) -> int:
        return 0


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Slice(Op):
    """A narrow view of a larger tensor; its backward pads the gradient to the whole (slice_backward)."""

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple(Grad(t, t.nbytes) for t in self.ins if t.name in need)

    def moved_bytes(self) -> int:
        return 0


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Concat(Op):
    """torch.cat: keeps nothing; gradients are views of the incoming one."""

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple(Grad(t, 0) for t in self.ins if t.name in need)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Square(Op):
    """x^2 (pow_backward: grad * (2 * x^1)); keeps x; two temporaries of x's size in backward."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return self.ins if _wants(need, *self.ins) else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        (x,) = self.ins
        return (Grad(x, x.nbytes, 2 * x.nbytes),) if x.name in need else ()


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class MeanLast(Op):
    """Mean over the last dimension: keeps sizes only; the gradient is expanded and divided into a new tensor."""

    def backward(self, need: Need) -> tuple[Grad, ...]:
        (x,) = self.ins
        return (Grad(x, x.nbytes),) if x.name in need else ()


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Rsqrt(Op):
    """1 / sqrt(x): keeps its result (rsqrt: -0.5 * grad * result^3; two temporaries)."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (self.out,) if _wants(need, *self.ins) else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        (x,) = self.ins
        return (Grad(x, x.nbytes, 2 * x.nbytes),) if x.name in need else ()


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Activate(Op):
    """silu, gelu: keeps its input; one kernel backward (silu_backward, gelu_backward)."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return self.ins if _wants(need, *self.ins) else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        (x,) = self.ins
        return (Grad(x, x.nbytes),) if x.name in need else ()


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Squash(Op):
    """tanh, sigmoid, relu: keeps its result; one kernel backward (tanh_backward, threshold_backward on `result`)."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (self.out,) if _wants(need, *self.ins) else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        (x,) = self.ins
        return (Grad(x, x.nbytes),) if x.name in need else ()


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Dropout(Op):
    """Dropout in training. CUDA's fused kernel keeps a one-byte mask (native_dropout); the CPU path multiplies by
    noise of the input's dtype and keeps that (aten/src/ATen/native/Dropout.cpp)."""

    mask: Tensor

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (self.mask,) if _wants(need, *self.ins) else ()

    def scratch_bytes(self) -> int:
        return self.mask.nbytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        (x,) = self.ins
        return (Grad(x, x.nbytes),) if x.name in need else ()


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class RotateHalf(Op):
    """cat(-x2, x1) over the last dimension: half of x as a temporary, keeps nothing.

    Backward: two slice_backward tensors of x's size, added up.
    """

    def scratch_bytes(self) -> int:
        return self.out.nbytes // 2

    def backward(self, need: Need) -> tuple[Grad, ...]:
        (x,) = self.ins
        return (Grad(x, x.nbytes, x.nbytes),) if x.name in need else ()


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Softmax(Op):
    """softmax over the last dimension: keeps its result.

    CUDA's backward makes `grad * output` beside the gradient (`product`; aten/src/ATen/native/cuda/SoftMax.cu,
    softmax_backward_cuda_out), the CPU's does not.
    """

    product: bool = False
    temporary_bytes: int = 0

    def scratch_bytes(self) -> int:
        return self.temporary_bytes

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (self.out,) if _wants(need, *self.ins) else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        (x,) = self.ins
        return (Grad(x, x.nbytes, self.out.nbytes if self.product else 0),) if x.name in need else ()


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class FusedAttention(Op):
    """Fused attention: ins = (q, k, v); keeps q, k, v, the output and the log-sum-exp (Dao 2022, arXiv:2205.14135).

    q and out are (B, N, S, D). FLOPs as flop_counter.sdpa_flop: the whole score matrix, causal or not; backward five
    products (two of them the recomputed scores and their gradient).
    """

    kv_len: int
    extras: tuple[Tensor, ...] = field(default=())
    """Tensors the kernel makes and keeps: log-sum-exp, generator state, the additive bias."""
    workspace_bytes: int = 0
    grad_workspace_bytes: int = 0

    def flops(self) -> int:
        return 4 * self.ins[0].numel * self.kv_len

    def grad_flops(self, need: Need) -> int:
        return 10 * self.ins[0].numel * self.kv_len if _wants(need, *self.ins) else 0

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (*self.ins, self.out, *self.extras) if _wants(need, *self.ins) else ()

    def scratch_bytes(self) -> int:
        return sum(t.nbytes for t in self.extras) + self.workspace_bytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        if not _wants(need, *self.ins):
            return ()
        last = len(self.ins) - 1
        return tuple(Grad(t, t.nbytes, self.grad_workspace_bytes * (i == last)) for i, t in enumerate(self.ins))


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Embedding(Op):
    """Row lookup: ins = (ids, W); keeps the ids where W trains; the gradient is dense."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (self.ins[0],) if self.ins[1].name in need else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        w = self.ins[1]
        return (Grad(w, w.nbytes),) if w.name in need else ()

    def moved_bytes(self) -> int:
        return 2 * self.out.nbytes


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class LogSoftmax(Op):
    """log_softmax: keeps its result."""

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (self.out,) if _wants(need, *self.ins) else ()

    def backward(self, need: Need) -> tuple[Grad, ...]:
        (x,) = self.ins
        return (Grad(x, x.nbytes),) if x.name in need else ()


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class NllLoss(Op):
    """nll_loss: ins = (log-probabilities, labels); keeps both and the total weight; a full gradient in backward."""

    total_weight: Tensor

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return (*self.ins, self.total_weight) if self.ins[0].name in need else ()

    def scratch_bytes(self) -> int:
        return self.total_weight.nbytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        x = self.ins[0]
        return (Grad(x, x.nbytes),) if x.name in need else ()


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Make(Op):
    """A tensor made without gradient (positions, tables, masks) from `ins`, with temporaries."""

    temporary_bytes: int = 0

    def scratch_bytes(self) -> int:
        return self.temporary_bytes

    def backward(self, need: Need) -> tuple[Grad, ...]:  # noqa: ARG002
        return ()

    def differentiable(self) -> bool:
        return False


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Hold(Op):
    """Not a computation: Python names that keep values alive up to this point."""

    def backward(self, need: Need) -> tuple[Grad, ...]:  # noqa: ARG002
        return ()

    def differentiable(self) -> bool:
        return False

    def moved_bytes(self) -> int:
        return 0


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class PackedLinear(Op):
    """y = x dequantize(W)^T (+ b) on a frozen packed weight: keeps nothing that autograd knows of.

    bitsandbytes puts the packed weight on the node itself, so a recomputation is not started for it.

    `forward_workspace_bytes` and `backward_workspace_bytes` are the dequantized copies each pass makes.
    `keeps_input` where the kernel stashes its input on its node (bitsandbytes int8).
    """

    forward_workspace_bytes: int
    backward_workspace_bytes: int
    keeps_input: bool = False
    adapters_clone: bool = False
    """Whether PEFT clones the output before adding its branch (lora/bnb.py, Linear4bit.forward)."""

    def flops(self) -> int:
        return 2 * self.ins[0].numel * self.out.shape[-1]

    def grad_flops(self, need: Need) -> int:
        return self.flops() if self.ins[0].name in need else 0

    def stashed(self, need: Need) -> tuple[Tensor, ...]:
        return (self.ins[0],) if self.keeps_input and _wants(need, *self.ins) else ()

    def scratch_bytes(self) -> int:
        return self.forward_workspace_bytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        x, _, *bias = self.ins
        rows = self.out.numel // self.out.shape[0]  # bitsandbytes sums over the batch; the engine over the rest
        grads = [Grad(t, rows * t.dtype.size) for t in bias if t.name in need]
        if x.name in need:
            grads.append(Grad(x, x.nbytes, self.backward_workspace_bytes))
        return tuple(grads)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class DetachedLinear(Op):
    """y = x W^T that is only read detached: its node dies before backward, so it keeps nothing and has no gradient."""

    def flops(self) -> int:
        return 2 * self.ins[0].numel * self.out.shape[-1]

    def backward(self, need: Need) -> tuple[Grad, ...]:  # noqa: ARG002
        return ()

    def differentiable(self) -> bool:
        return False


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Formula(Op):
    """A node whose rule is stated where it is used: an operator, or a library's autograd function, of one method.

    Keeps `keeps` where any input needs a gradient; of `grads` makes those that are needed, in order.
    """

    keeps: tuple[Tensor, ...] = ()
    grads: tuple[Grad, ...] = ()
    forward_flops: int = 0
    backward_flops: int = 0
    temporary_bytes: int = 0

    def flops(self) -> int:
        return self.forward_flops

    def grad_flops(self, need: Need) -> int:
        return self.backward_flops if _wants(need, *self.ins) else 0

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return self.keeps if _wants(need, *self.ins) else ()

    def scratch_bytes(self) -> int:
        return self.temporary_bytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        return tuple(g for g in self.grads if g.to.name in need)


def internal(op_name: str, label: str, shape: tuple[int, ...], dtype: DType) -> Tensor:
    """A tensor that only one op's kernel makes and keeps."""
    return Tensor(f"{op_name}.{label}", shape, dtype)
