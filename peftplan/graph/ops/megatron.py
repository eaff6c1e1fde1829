"""Layers of TransformerEngine as Megatron-Core calls them: gradients of weights are added to a buffer that is there.

TransformerEngine 2.x, pytorch/module/layernorm_linear.py and linear.py; Megatron-Core, core/tensor_parallel/layers.py:
`fuse_wgrad_accumulation` puts a weight's gradient into `main_grad`, and autograd is given a tensor of the weight's
shape that all weights of the shape share (get_dummy_wgrad): none is made here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import final

from peftplan.graph.core import Grad, Need, Op, Tensor
from peftplan.graph.ops.shapes import wants


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class MainGradLinear(Op):
    """A linear layer, with the norm before it and the tokens of other ranks around it. ins = (x, W, gains...).

    Keeps `keeps`, of which `made` are its own. `tokens` is how many rows the product has. `gathered_bytes` are those
    of its input from all ranks, which backward gathers again, `partial_bytes` those of a result that is yet to be
    reduced; backward has the two change places.
    """

    tokens: int
    keeps: tuple[Tensor, ...] = ()
    made: tuple[Tensor, ...] = ()
    gathered_bytes: int = 0
    """Where the input is of a part of the tokens."""
    partial_bytes: int = 0
    """Where the output is."""
    partial_grad_bytes: int = 0
    """The gradient of the input before it is reduced to this rank's part, and before the norm's."""

    def flops(self) -> int:
        return 2 * self.tokens * prod(self.ins[1].shape)

    def grad_flops(self, need: Need) -> int:
        return self.flops() * sum(t.name in need for t in self.ins[:2])

    def saved(self, need: Need) -> tuple[Tensor, ...]:
        return self.keeps if wants(need, self.ins) else ()

    def scratch_bytes(self) -> int:
        return sum(t.nbytes for t in self.made) + self.gathered_bytes + self.partial_bytes

    def backward(self, need: Need) -> tuple[Grad, ...]:
        x = self.ins[0]
        if x.name not in need:
            return ()
        scratch = self.gathered_bytes + self.partial_bytes + self.partial_grad_bytes
        return (Grad(x, x.nbytes, scratch),)
