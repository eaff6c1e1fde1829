"""Uni-LoRA: LoRA's matrices read from one short trained vector for the whole model (Li 2025, arXiv:2506.00799).

Trains: theta_d_length numbers, once; plus `bias` and copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype, r numbers a token, and both matrices, put together anew in
each forward. Beside the weights lie, for every element of them, its place (int64) and its scale.
Not modelled: embeddings, packed bases (PEFT fails on them).
Mirrors peft/tuners/unilora/layer.py Linear.forward and _get_lora_matrices, peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Grad, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, builder, check_rank, check_share
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host
from peftplan.units import DType

HARMLESS = COMMON | {"proj_seed", "init_theta_d_bound", "init_weights", "save_indices"}


@final
@dataclass(frozen=True)
class Unilora(OnLinears):
    """PEFT's UniLoraConfig."""

    r: int = 4
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    bias: Literal["none", "all", "unilora_only"] = "none"
    title: ClassVar[str] = "Uni-LoRA"
    returns_input: ClassVar[bool] = True
    no_4bit: ClassVar[str] = "PEFT holds its scales in the packed weight's integers: they are 0, and nothing trains"
    no_8bit: ClassVar[str] = no_4bit
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_rank(self.r)
        check_share("unilora_dropout", self.unilora_dropout)
        if self.theta_d_length < 1:
            raise RequestError(f"method.theta_d_length={self.theta_d_length}: must be at least 1")

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        count = sum(self.r * sum(c.module.weight.shape) for c in chosen)
        return (
            Tensor("@unilora_indices", (count,), DType.int64, BUFFER),
            Tensor("@unilora_scales", (count,), host.new_dtype, BUFFER),
        )

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        theta = Tensor("@unilora_theta_d", (self.theta_d_length,), host.new_dtype, ADAPTER, True)
        with b.marked(module.site, "down"):
            theta = b.alias(theta)
            a = self._matrix(b, theta, (self.r, module.in_features), host)
            up = self._matrix(b, theta, (module.out_features, self.r), host)
            x = b.cast(module.x, host.new_dtype, label="unilora_x")
            given = b.dropout(x, self.unilora_dropout)
            down = b.linear(given, a, label="unilora_A")
        with b.marked(module.site, "up"):
            change = b.linear(down, up, label="unilora_B")
        with b.marked(module.site, "extra"):
            out = b.cast(b.add(base, change, label="sum"), module.x.dtype, label="out")
            b.hold(a, up, x, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))

    def _matrix(self, b: Builder, theta: Tensor, shape: tuple[int, int], host: Host) -> Tensor:
        """theta[indices] * scales; the gradient is put into zeros, out of place."""
        full = theta.logical_bytes
        out = Tensor("", shape, theta.dtype)
        read = b.formula("read", out, theta, grads=(Grad(theta, full, full),))
        return b.mul(read, Tensor("@unilora_scales", shape, host.new_dtype, BUFFER), label="scaled")


METHOD = Unilora
EXAMPLES = (Unilora(), Unilora(r=3, theta_d_length=50, target_modules="all-linear", unilora_dropout=0.1))
UNVERIFIED: dict[str, str] = {}
