"""VeLoRA: A's backward reads one number per group of features in place of its input (Miles 2024, arXiv:2405.17991).

Mirrors peft/tuners/lora/velora.py VeloraFunction and peft/tuners/lora/variants.py VeloraLinearVariant.forward, peft
0.21.2. The projection that the groups are reduced by is a buffer per module; where it is the batch's average it is made
anew in every forward, and so among what is kept for backward; of checkpointed layers that is left out, in / num_groups
numbers a module too low.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from peftplan.errors import RequestError, Unsupported
from peftplan.graph.builder import Builder
from peftplan.graph.core import INPUT, Grad, Need, Op, Tensor
from peftplan.graph.ops import internal
from peftplan.methods._lora import Branch


@dataclass(frozen=True)
class Velora:
    """PEFT's VeloraConfig."""

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def check(self) -> None:
        if self.num_groups < 1 or self.scale <= 0:
            raise RequestError(
                f"method.velora_config: num_groups={self.num_groups}, scale={self.scale}: give positive numbers"
            )

    def group(self, wide: int) -> int:
        """Features per group, the last one padded."""
        return -(-wide // self.num_groups)

    def __call__(self, b: Builder, branch: Branch) -> Tensor:
        """`result + scaling B(VeloraFunction(dropout(x), A))`."""
        if b.numerics.autocast is not None:
            raise Unsupported("VeLoRA under autocast is not modelled; use a half-precision base without -mixed")
        site, a = branch.module.site, branch.a
        with b.marked(site, "down"):
            given = b.dropout(branch.x, branch.dropout)
            down = self._compressed(b, given, a)
        with b.marked(site, "up"):
            delta = b.scale(b.linear(down, branch.up, branch.bias, label="lora_B"))
        with b.marked(site, "extra"):
            total = b.add(branch.base, delta, label="sum")
            b.hold(given, down)
        return total

    def _compressed(self, b: Builder, x: Tensor, a: Tensor) -> Tensor:
        name = b.name("lora_A")
        tokens, wide = x.numel // x.shape[-1], x.shape[-1]
        padded = self.num_groups * self.group(wide)
        averaged = self.init_type == "batch_average"
        projection = internal(name, "projection", (self.group(wide),), a.dtype)._replace(kind=INPUT)
        op = CompressedLinear(
            name=name,
            ins=(x, a),
            out=Tensor(name, (*x.shape[:-1], a.shape[0]), x.dtype),
            part="down",
            compressed=internal(name, "compressed", (tokens, self.num_groups), x.dtype),
            projection=projection if averaged else None,
            padded=padded,
        )
        b.ops.append(op)
        return op.out


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedLinear(Op):
    """x A^T that keeps `compressed`, (tokens, groups), in place of x. Backward: x's gradient, then x as it is made
    again from the compressed, (tokens, `padded`) and cut and scaled, and A's gradient with it."""

    compressed: Tensor
    projection: Tensor | None
    """Where this forward made it: it takes the place of the buffer of its size."""
    padded: int

    def flops(self) -> int:
        x, a = self.ins
        tokens = x.numel // x.shape[-1]
        return 2 * x.numel * a.shape[0] + 2 * tokens * self.padded

    def grad_flops(self, need: Need) -> int:
        x, a = self.ins
        return 2 * x.numel * a.shape[0] * ((x.name in need) + (a.name in need))

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        kept = (self.compressed,) if self.projection is None else (self.compressed, self.projection)
        return kept if any(t.name in need for t in self.ins) else ()

    def scratch_bytes(self) -> int:
        x = self.ins[0]
        tokens = x.numel // x.shape[-1]
        return tokens * self.padded * x.dtype.size if self.padded != x.shape[-1] else 0

    def backward(self, need: Need) -> tuple[Grad, ...]:
        x, a = self.ins
        tokens = x.numel // x.shape[-1]
        made = tokens * self.padded * x.dtype.size + x.nbytes
        grads = [Grad(x, x.nbytes)] if x.name in need else []
        return (*grads, *([Grad(a, a.nbytes, made)] if a.name in need else []))
