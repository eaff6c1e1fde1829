"""C3A: the weight changes by blocks of circular convolutions (Chen 2024, arXiv:2407.19342).

Trains: in out / block_size per adapted linear layer; plus `bias` and copies of `modules_to_save`.
Keeps for backward: the layer's input in fp32.
Not modelled: embeddings.
Mirrors peft/tuners/c3a/layer.py C3ALinear.forward and utils.py BlockCircularConvolution, peft 0.21.2. Everything runs
in fp32 and complex64, whatever the model's dtype; the transforms of input and output take eight bytes an element.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError
from peftplan.graph.core import ADAPTER, Grad, Need, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import OnLinears, builder, by_pattern
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"init_weights"}
FP32 = DType.float32


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Convolution(Op):
    """peft's autograd function: ins = (x, kernel); keeps both.

    Forward: the transforms of both, their product in the Fourier domain, and its transform back, whose real part is the
    result. Backward: the same three ways for the two gradients, which stay complex until they are read.
    """

    def flops(self) -> int:
        return 2 * (self.ins[0].numel // self.ins[0].shape[-1]) * self.ins[1].numel

    def grad_flops(self, need: Need) -> int:  # noqa: ARG002
        return 2 * self.flops()

    def saved(self, need: Need) -> tuple[Tensor, ...]:  # noqa: ARG002
        x, kernel = self.ins  # a Python function saves when it has run: x by a view made in it
        return x._replace(name=f"{self.name}.x", base=x.storage), kernel

    def _complex(self) -> tuple[int, int, int]:
        x, kernel = self.ins
        return 8 * x.numel, 8 * kernel.numel, self.out.nbytes

    def scratch_bytes(self) -> int:
        x, kernel, out = self._complex()
        return max(x + kernel, out)

    def backward(self, need: Need) -> tuple[Grad, ...]:
        wide, narrow, out = self._complex()
        x, kernel = self.ins
        given = (Grad(x, wide, out + max(narrow, wide)),) if x.name in need else ()
        spare = wide if not given else 0
        return (*given, Grad(kernel, narrow, out + spare + max(wide, narrow)))


@final
@dataclass(frozen=True)
class C3a(OnLinears):
    """PEFT's C3AConfig."""

    block_size: int = 256
    block_size_pattern: dict[str, int] = field(default_factory=dict)
    bias: Literal["none", "all", "c3a_only"] = "none"
    title: ClassVar[str] = "C3A"
    returns_input: ClassVar[bool] = True
    in_place: ClassVar[bool] = True
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    def trained_biases(self) -> str:
        return self.bias

    def size(self, path: str) -> int:
        return by_pattern(path, self.block_size, self.block_size_pattern)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        if size < 1 or module.in_features % size or module.out_features % size:
            raise RequestError(f"method.block_size={size} does not divide both sides of {module.path}")
        b, base = builder(module, host)
        shape = (module.out_features // size, module.in_features // size, size)
        with b.marked(module.site, "down"):
            weight = b.weight("c3a_kernel", *shape, dtype=host.new_dtype, kind=ADAPTER)
            x = b.cast(module.x, FP32, label="c3a_x")
            kernel = b.cast(weight, FP32, label="kernel32")
            name = b.name("convolution")
            out = Tensor(name, base.shape, FP32, stored_bytes=8 * base.numel)  # a view of its complex storage
            b.ops.append(Convolution(name=name, ins=(x, kernel), out=out, site=module.site, part="down"))
            change = b.scale(out, label="share")
        with b.marked(module.site, "extra"):
            total = b.add_into(base, b.cast(change, base.dtype, label="delta"))
            result = b.cast(total, module.x.dtype, label="out")
            b.hold(kernel, change, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, result, module, name=self.title))


METHOD = C3a
EXAMPLES = (C3a(block_size=8), C3a(block_size=4, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
