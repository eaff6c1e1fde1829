"""Writing ops the way modelling code is written: `h = b.linear(x, w)`; the builder names them and infers dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import final

from peftplan.graph.core import ACTIVATION, ADAPTER, BUFFER, Grad, Op, Tensor
from peftplan.graph.mesh import ONE, Mesh
from peftplan.graph.ops import (
    Activate,
    Add,
    AddConst,
    Cast,
    Concat,
    Copy,
    DetachedLinear,
    Div,
    Dropout,
    Flattened,
    Formula,
    Hold,
    Hooked,
    Keep,
    Linear,
    Make,
    MatMul,
    MeanLast,
    Mul,
    Part,
    RotateHalf,
    Rsqrt,
    Scale,
    Slice,
    Softmax,
    Solve,
    Square,
    Squash,
    View,
    WeightCast,
    internal,
)
from peftplan.units import DType, promote


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerics:
    """Which dtypes ops compute in, and whose kernel rules apply.

    `autocast` is the dtype torch.autocast runs matrix products in, None outside autocast. Under autocast a trainable
    fp32 weight is cast once per forward and the copy cached; anything else is cast at each use
    (aten/src/ATen/autocast_mode.cpp, cached_cast).
    """

    autocast: DType | None = None
    backend: str = "cuda"
    capability: tuple[int, int] | None = None
    """The GPU's CUDA compute capability, where one is given."""

    float8: bool = False
    """Whether the layers' products are torchao's float8 ones."""

    @property
    def mask_dtype_is_input(self) -> bool:
        return self.backend == "cpu"


class _Restored:
    """What a `with` block of a Builder goes back to when it ends."""

    __slots__ = ("_before", "_builder")

    def __init__(self, builder: Builder, *before: str) -> None:
        self._builder = builder
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self._builder.restore(*self._before)


@final
class Builder:
    """Collects ops; every method appends one and returns its output. Names are unique under the open scopes."""

    def __init__(self, numerics: Numerics, prefix: str = "", mesh: Mesh = ONE) -> None:
        self.numerics = numerics
        self.mesh = mesh
        self.ops: list[Op] = []
        self._prefix = prefix
        self._names: dict[str, int] = {}
        self._site = ""
        self._part = "base"

    def scope(self, name: str) -> _Restored:
        """Names inside the `with` block start with `name.`: a module of the model."""
        back = _Restored(self, self._prefix, self._site, self._part)
        self._prefix += f"{name}."
        return back

    def marked(self, site: str, part: str = "base") -> _Restored:
        """Ops inside the `with` block carry these two marks."""
        back = _Restored(self, self._prefix, self._site, self._part)
        self._site, self._part = site, part
        return back

    def restore(self, prefix: str, site: str, part: str) -> None:
        """The prefix of names and the marks of ops from here on."""
        self._prefix, self._site, self._part = prefix, site, part

    def name(self, label: str) -> str:
        """A new value's name: one per region, even where the module's weights are the whole model's."""
        full = self._prefix.removeprefix("@") + label
        seen = self._names.get(full, 0)
        self._names[full] = seen + 1
        return f"{full}#{seen}" if seen else full

    def weight(self, label: str, *shape: int, dtype: DType, kind: str = "weight") -> Tensor:
        return Tensor(self._prefix + label, shape, dtype, kind, kind == ADAPTER)

    def _emit(self, op: Op) -> Tensor:
        self.ops.append(op)
        return op.out

    # -- linear algebra -----------------------------------------------------------------------------------------

    def linear(
        self, x: Tensor, w: Tensor, bias: Tensor | None = None, *, label: str = "linear", autocast: bool = True
    ) -> Tensor:
        """(..., i) x (o, i) -> (..., o). Without `autocast`, a kernel that autocast does not know."""
        given = x
        if autocast and self.numerics.autocast is not None:  # arguments are evaluated from the last to the first
            bias = self.autocast(bias) if bias is not None else None
            w = self.autocast(w)
            x = self.autocast(x)
        n = self.name(label)
        out = Tensor(n, (*x.shape[:-1], w.shape[0]), x.dtype)
        ins = (x, w) if bias is None else (x, w, bias)
        self._emit(Linear(name=n, ins=ins, out=out, site=self._site, part=self._part))
        if x is not given:
            self.hold(given, x)
        return out

    def matmul(self, a: Tensor, b: Tensor, *shape: int, inner: int, label: str, autocast: bool = True) -> Tensor:
        """(..., i, j) x (..., j, k). Without `autocast`, inside an operator that autocast has dealt with."""
        given = a, b
        if autocast and self.numerics.autocast is not None:  # arguments are evaluated from the last to the first
            b = self.autocast(b)
            a = self.autocast(a)
        n = self.name(label)
        out = Tensor(n, shape, a.dtype)
        self._emit(MatMul(name=n, ins=(a, b), out=out, inner=inner, site=self._site, part=self._part))
        if (a, b) != given:
            self.hold(*given)
        return out

    def autocast(self, t: Tensor) -> Tensor:
        """What torch.autocast makes of an operand of a matrix product."""
        target = self.numerics.autocast
        if target is None or t.dtype is target:
            return t
        if not t.is_param:
            return self.cast(t, target)
        n = self.name(t.name.rsplit(".", 1)[-1] + "_cast")
        return self._emit(
            WeightCast(name=n, ins=(t,), out=Tensor(n, t.shape, target), site=self._site, part=self._part)
        )

    def kron(self, a: Tensor, b: Tensor, *shape: int, label: str = "kron") -> Tensor:
        """Kronecker product of matrices, or of as many of them as `shape` says first: one elementwise product of views
        (aten/src/ATen/native/LinearAlgebra.cpp, KronImpl)."""
        n = self.name(label)
        out = Tensor(n, shape, promote(a.dtype, b.dtype))
        return self._emit(Mul(name=n, ins=(a, b), out=out, site=self._site, part=self._part))

    # -- elementwise --------------------------------------------------------------------------------------------

    def _binary(self, cls: type[Mul] | type[Add] | type[Div], a: Tensor, b: Tensor, label: str) -> Tensor:
        n = self.name(label)
        wider = a.shape == b.shape or len(a.shape) > len(b.shape) or prod(a.shape) >= prod(b.shape)
        shape = a.shape if wider else b.shape
        out = Tensor(n, shape, promote(a.dtype, b.dtype))
        return self._emit(cls(name=n, ins=(a, b), out=out, site=self._site, part=self._part))

    def mul(self, a: Tensor, b: Tensor, label: str = "mul") -> Tensor:
        return self._binary(Mul, a, b, label)

    def add(self, a: Tensor, b: Tensor, label: str = "add") -> Tensor:
        return self._binary(Add, a, b, label)

    def _unary(self, cls: type[Op], x: Tensor, label: str, shape: tuple[int, ...] | None = None) -> Tensor:
        n = self.name(label)
        out = Tensor(n, x.shape if shape is None else shape, x.dtype)
        return self._emit(cls(name=n, ins=(x,), out=out, site=self._site, part=self._part))

    def cast(self, x: Tensor, dtype: DType, label: str = "cast") -> Tensor:
        """x itself where it has the dtype already."""
        if x.dtype is dtype:
            return x
        n = self.name(label)
        out = Tensor(n, x.shape, dtype)
        return self._emit(Cast(name=n, ins=(x,), out=out, site=self._site, part=self._part))

    def scale(self, x: Tensor, label: str = "scale") -> Tensor:
        return self._unary(Scale, x, label)

    def add_const(self, x: Tensor, label: str = "add_const") -> Tensor:
        return self._unary(AddConst, x, label)

    def square(self, x: Tensor, label: str = "square") -> Tensor:
        return self._unary(Square, x, label)

    def mean_last(self, x: Tensor, label: str = "mean") -> Tensor:
        return self._unary(MeanLast, x, label, (*x.shape[:-1], 1))

    def rsqrt(self, x: Tensor, label: str = "rsqrt") -> Tensor:
        return self._unary(Rsqrt, x, label)

    def activate(self, x: Tensor, label: str = "act") -> Tensor:
        return self._unary(Activate, x, label)

    def squash(self, x: Tensor, label: str = "squash") -> Tensor:
        """tanh or relu."""
        return self._unary(Squash, x, label)

    def softmax(self, x: Tensor, dtype: DType, label: str = "softmax", *, guarded: bool = False) -> Tensor:
        """softmax(x, -1, dtype): CUDA fuses the cast to fp32 (aten/src/ATen/native/SoftMax.cpp, softmax).

        `guarded`: _safe_softmax, which makes the softmax, a mask of its -inf and then the result; a trace sees only
        the result.
        """
        on_cuda = self.numerics.backend == "cuda"
        if not on_cuda:
            x = self.cast(x, dtype, label=f"{label}_in")
        n = self.name(label)
        out = Tensor(n, x.shape, dtype)
        guard = out.nbytes + out.numel if guarded and on_cuda else 0
        return self._emit(
            Softmax(name=n, ins=(x,), out=out, product=on_cuda, temporary_bytes=guard, site=self._site, part=self._part)
        )

    def rotate_half(self, x: Tensor, label: str = "rotate_half") -> Tensor:
        return self._unary(RotateHalf, x, label)

    def dropout(self, x: Tensor, p: float, label: str = "dropout") -> Tensor:
        """x itself for p = 0 (nn.Identity in PEFT, a no-op in torch)."""
        if p == 0:
            return x
        n = self.name(label)
        mask_dtype = x.dtype if self.numerics.mask_dtype_is_input else DType.boolean
        mask = Tensor(f"{n}.mask", x.shape, mask_dtype)
        out = Tensor(n, x.shape, x.dtype)
        return self._emit(Dropout(name=n, ins=(x,), out=out, mask=mask, site=self._site, part=self._part))

    # -- layout -------------------------------------------------------------------------------------------------

    def copy(
        self, x: Tensor, *shape: int, label: str = "copy", grad_copied: bool = False, dtype: DType | None = None
    ) -> Tensor:
        n = self.name(label)
        out = Tensor(n, shape or x.shape, dtype or x.dtype)
        return self._emit(Copy(name=n, ins=(x,), out=out, grad_copied=grad_copied, site=self._site, part=self._part))

    def view(self, x: Tensor, *shape: int, label: str = "view", grad_copied: bool = False) -> Tensor:
        """A view whose gradient matters: as an op, because its gradient may be copied."""
        n = self.name(label)
        out = Tensor(n, shape or x.shape, x.dtype, _kind_of_part(x), base=x.storage)
        return self._emit(View(name=n, ins=(x,), out=out, grad_copied=grad_copied, site=self._site, part=self._part))

    def slice(self, x: Tensor, *shape: int, label: str = "slice") -> Tensor:
        n = self.name(label)
        out = Tensor(n, shape, x.dtype, _kind_of_part(x), base=x.storage)
        return self._emit(Slice(name=n, ins=(x,), out=out, site=self._site, part=self._part))

    def part(self, x: Tensor, *shape: int, label: str) -> Tensor:
        """One of the views that torch.split gives."""
        n = self.name(label)
        out = Tensor(n, shape, x.dtype, _kind_of_part(x), base=x.storage)
        return self._emit(Part(name=n, ins=(x,), out=out, site=self._site, part=self._part))

    def concat(self, parts: tuple[Tensor, ...], *shape: int, label: str = "cat") -> Tensor:
        n = self.name(label)
        out = Tensor(n, shape, reduce(promote, (t.dtype for t in parts)))
        return self._emit(Concat(name=n, ins=parts, out=out, site=self._site, part=self._part))

    def flattened(self, weights: tuple[Tensor, ...], label: str = "flat") -> Tensor:
        """Parameters of one dtype that lie one after the other in one buffer, as one."""
        n = self.name(label)
        first = weights[0]
        out = Tensor(n, (sum(w.numel for w in weights),), first.dtype, BUFFER, base=first.name)
        return self._emit(Flattened(name=n, ins=weights, out=out, site=self._site, part=self._part))

    # -- in place -----------------------------------------------------------------------------------------------

    def put(self, target: Tensor, values: Tensor, label: str = "put") -> Tensor:
        """`target[indices] = values`: the gradient of the values is gathered into a new tensor (index_put_)."""
        n = self.name(label)
        out = target._replace(name=n, base=target.storage)
        return self._emit(
            View(name=n, ins=(target, values), out=out, grad_copied=True, site=self._site, part=self._part)
        )

    def add_into(self, total: Tensor, t: Tensor, label: str = "add_", *, scaled: bool = False) -> Tensor:
        """`total.add_(t, alpha)`; `scaled` where alpha is not 1, which makes t's gradient anew."""
        t = self.view(t, label="times_alpha", grad_copied=True) if scaled else t
        n = self.name(label)
        out = total._replace(name=n, base=total.storage)
        return self._emit(Add(name=n, ins=(total, t), out=out, site=self._site, part=self._part))

    # -- bookkeeping --------------------------------------------------------------------------------------------

    def make(
        self, label: str, *shape: int, dtype: DType, ins: tuple[Tensor, ...] = (), temporary_bytes: int = 0,
        kind: str = ACTIVATION,
    ) -> Tensor:  # fmt: skip
        """A tensor without gradient, one for the whole model (positions, tables, masks)."""
        n = f"@{label}"
        return self._emit(Make(name=n, ins=ins, out=Tensor(n, shape, dtype, kind), temporary_bytes=temporary_bytes))

    def plain(self, label: str, *shape: int, dtype: DType, ins: tuple[Tensor, ...] = ()) -> Tensor:
        """A tensor without gradient that lives like any other value."""
        n = self.name(label)
        return self._emit(Make(name=n, ins=ins, out=Tensor(n, shape, dtype), site=self._site))

    def hold(self, *tensors: Tensor) -> None:
        """Python names that go out of scope here and not earlier."""
        n = self.name("hold")
        out = Tensor(n, (), DType.boolean, BUFFER, stored_bytes=0)
        self.ops.append(Hold(name=n, ins=tensors, out=out, site=self._site, part=self._part))

    def keep(self, *tensors: Tensor) -> None:
        """What a closure holds for as long as the graph lives."""
        n = self.name("keep")
        out = Tensor(n, (), DType.boolean, BUFFER, stored_bytes=0)
        self.ops.append(Keep(name=n, ins=tensors, out=out, site=self._site, part=self._part))

    # -- what single methods need -------------------------------------------------------------------------------

    def div(self, a: Tensor, b: Tensor, label: str = "div") -> Tensor:
        return self._binary(Div, a, b, label)

    def detached_linear(self, x: Tensor, w: Tensor, label: str) -> Tensor:
        """A linear layer whose result is only read detached; operands as they are."""
        n = self.name(label)
        out = Tensor(n, (*x.shape[:-1], w.shape[0]), x.dtype)
        return self._emit(DetachedLinear(name=n, ins=(x, w), out=out, site=self._site, part=self._part))

    def formula(
        self, label: str, out: Tensor, *ins: Tensor, keeps: tuple[Tensor, ...] = (), keeps_out: bool = False,
        grads: tuple[Grad, ...] = (), temporary_bytes: int = 0,
    ) -> Tensor:  # fmt: skip
        """A node whose rule is stated here; `out` gives shape and dtype, and the storage it is a part of, if any."""
        n = self.name(label)
        made = out._replace(name=n, kind=ACTIVATION, trainable=False)
        op = Formula(
            name=n, ins=ins, out=made, keeps=(*keeps, made) if keeps_out else keeps, grads=grads,
            temporary_bytes=temporary_bytes, site=self._site, part=self._part,
        )  # fmt: skip
        return self._emit(op)

    def alias(self, weight: Tensor) -> Tensor:
        """A parameter that several ops read: their gradients meet here, as in the engine's input buffer."""
        n = self.name(f"{weight.name.rsplit('.', 1)[-1]}_alias")
        out = Tensor(n, weight.shape, weight.dtype, BUFFER, base=weight.name)
        return self._emit(View(name=n, ins=(weight,), out=out, site=self._site, part=self._part))

    def hooked(self, weight: Tensor, *, flops: int, temporary_bytes: int) -> Tensor:
        """A parameter to be read by one op, on whose gradient a hook works; it makes a new one besides temporaries."""
        n = self.name(f"{weight.name.rsplit('.', 1)[-1]}_hooked")
        out = Tensor(n, weight.shape, weight.dtype, BUFFER, base=weight.name)
        op = Hooked(
            name=n, ins=(weight,), out=out, hook_flops=flops, temporary_bytes=temporary_bytes, site=self._site,
            part=self._part,
        )  # fmt: skip
        return self._emit(op)

    def minus(self, a: Tensor, b: Tensor, label: str = "sub") -> Tensor:
        """a - b: the gradient of b is a new tensor."""
        return self.add(a, self.view(b, label=f"{label}_other", grad_copied=True), label)

    def solve(self, a: Tensor, b: Tensor, label: str = "solved") -> Tensor:
        """torch.linalg.solve of square matrices, or of batches of them."""
        n = self.name(label)
        lu = internal(n, "lu", a.shape, a.dtype)
        pivots = internal(n, "pivots", a.shape[:-1], DType.int32)
        out = Tensor(n, b.shape, b.dtype)
        return self._emit(Solve(name=n, ins=(a, b), out=out, lu=lu, pivots=pivots, site=self._site, part=self._part))

    def norm(self, x: Tensor, *shape: int, label: str = "norm") -> Tensor:
        """torch.linalg.vector_norm: keeps its result and x; x over it and a mask are made besides the gradient
        (FunctionsManual.cpp, linalg_vector_norm_backward)."""
        out = Tensor("", shape, x.dtype)
        grads = (Grad(x, x.logical_bytes, x.logical_bytes + out.numel),)
        return self.formula(label, out, x, keeps=(x,), keeps_out=True, grads=grads)


def _kind_of_part(x: Tensor) -> str:
    """What a view of a buffer, or of a parameter's alias, is for: nobody frees it either."""
    return BUFFER if x.kind == BUFFER else ACTIVATION
