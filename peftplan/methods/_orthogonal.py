"""AdaLoRA's penalty: what the loss adds for factors that are not orthogonal.

Mirrors peft/tuners/adalora/model.py AdaLoraModel.forward, peft 0.21.2: it runs after the model's own loss, over every
A and B of the model, so its backward runs before the model's. Each weight keeps an r x r matrix and a number. The
loop's locals (a Gram matrix, an identity) are freed here with each layer, which errs low by them in the penalty alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from peftplan.graph.builder import Builder
from peftplan.graph.core import PENALTY, Grad, Need, Op, Region, Tensor
from peftplan.graph.ops.shapes import made
from peftplan.methods.base import Host


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Gram(Op):
    """A matrix times its own transpose, `mm` of one tensor twice: two gradients of it, the second added to the first.

    Under autocast ins are two casts, each with a gradient of its own.
    """

    def flops(self) -> int:
        return 2 * self.ins[0].numel * self.out.shape[0]

    def grad_flops(self, need: Need) -> int:  # noqa: ARG002
        return 2 * self.flops()

    def saved(self, need: Need) -> tuple[Tensor, ...]:  # noqa: ARG002
        return self.ins

    def backward(self, need: Need) -> tuple[Grad, ...]:
        once = self.ins[0].logical_bytes
        return made(self.ins[::-1], need) if len(self.ins) > 1 else (Grad(self.ins[0], once, once),)


def penalised(region: Region, host: Host) -> Region:
    """The region with its share of the loss: how far every A A^T and B^T B is from the identity."""
    weights = [t for t in region.params() if t.name.endswith((".lora_A", ".lora_B"))]
    if not weights:
        return region
    b = Builder(host.numerics, f"{PENALTY}.")
    dtype = host.numerics.autocast or host.new_dtype
    entry = total = Tensor(PENALTY, (), dtype)
    last: tuple[Tensor, ...] = ()
    for t in weights:
        gram = _gram(b, t)
        identity = b.plain("identity", *gram.shape, dtype=gram.dtype)
        b.hold(*last)
        last = gram, identity
        apart = b.add_const(gram, label="apart")
        total = b.add_into(total, b.norm(apart), label="sum")
    b.hold(*last)
    return replace(region, penalty=Region(name=PENALTY, ops=tuple(b.ops), entry=entry, exit=total))


def _gram(b: Builder, t: Tensor) -> Tensor:
    """A A^T or B^T B, square in the rank."""
    read = b.alias(t)
    ins = (read,) if b.numerics.autocast is None else (b.autocast(read), b.autocast(read))
    name = b.name("gram")
    rank = t.shape[0 if t.name.endswith("A") else 1]
    out = Tensor(name, (rank, rank), ins[0].dtype)
    b.ops.append(Gram(name=name, ins=ins, out=out))
    return out
