"""DeLoRA: LoRA whose rank-one parts have unit norm, times a trained strength (Bini 2025, arXiv:2503.18225).

Trains: r (in + out) + 1 per adapted linear layer; plus `bias` and copies of `modules_to_save`.
Keeps for backward: the input times the weight's norms, in their dtype, and r numbers a token twice.
Not modelled: embeddings, packed bases (PEFT fails on them).
Mirrors peft/tuners/delora/layer.py DeloraLinear.forward, peft 0.21.2. The norms of the weight's columns are a buffer
of the adapter's dtype.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Grad, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, builder, by_pattern, check_rank, check_share
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host

HARMLESS = COMMON | {"delora_lambda", "lambda_pattern", "init_weights"}


@final
@dataclass(frozen=True)
class Delora(OnLinears):
    """PEFT's DeloraConfig."""

    r: int = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)
    module_dropout: float = 0.0
    bias: Literal["none", "all", "delora_only"] = "none"
    title: ClassVar[str] = "DeLoRA"
    reads_weight: ClassVar[bool] = True
    returns_input: ClassVar[bool] = True
    no_4bit: ClassVar[str] = "PEFT takes the norm of the weight, and torch has none of packed integers"
    no_8bit: ClassVar[str] = no_4bit

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_rank(min((self.r, *self.rank_pattern.values())))
        check_share("module_dropout", self.module_dropout)
        if self.modules_to_save and "delora_w_norm".endswith(self.modules_to_save):
            raise RequestError(
                f"modules_to_save {','.join(self.modules_to_save)!r} also ends the name of DeLoRA's own delora_w_norm, "
                "which PEFT would copy; write model.norm"
            )

    def size(self, path: str) -> int:
        return by_pattern(path, self.r, self.rank_pattern)

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        return (Tensor("@w_norm", (sum(c.module.in_features for c in chosen),), host.new_dtype, BUFFER),)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        b, base = builder(module, host)
        dtype = host.new_dtype
        a, up, strength = (
            b.weight(name, *shape, dtype=dtype, kind=ADAPTER)
            for name, shape in (
                ("delora_A", (size, module.in_features)),
                ("delora_B", (module.out_features, size)),
                ("delora_lambda", (1,)),
            )
        )
        norms = Tensor("@w_norm", (module.in_features,), dtype, BUFFER)
        with b.marked(module.site, "down"):
            b.hold(a, up)  # in the order they are registered in
            a, up = b.alias(a), b.alias(up)
            total = b.plain("add_out", *base.shape, dtype=base.dtype)
            x = b.dropout(module.x, self.module_dropout)
            down = b.linear(b.mul(x, norms, label="x_norm"), a, label="delora_A")
            b.hold(x)
        with b.marked(module.site, "up"):
            a_norm, b_norm = (_clamped_norm(b, t, size) for t in (a, up))
            scaling = b.div(b.scale(strength, label="share"), b.mul(a_norm, b_norm, label="norms"), label="scaling")
            change = b.linear(b.mul(down, scaling, label="scaled"), up, label="delora_B")
            total = b.add_into(total, change)
        with b.marked(module.site, "extra"):
            out = b.cast(b.add(base, total, label="sum"), module.x.dtype, label="out")
            b.hold(base, change, total, x, a_norm, b_norm, scaling, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))


def _clamped_norm(b: Builder, t: Tensor, rank: int) -> Tensor:
    """clamp(t.norm(dim), min): keeps the norm; its gradient is chosen by a mask (clamp_min: where(self >= min))."""
    norm = b.norm(t, rank)
    return b.formula("clamped", norm, norm, keeps=(norm,), grads=(Grad(norm, norm.nbytes, norm.numel + 4),))


METHOD = Delora
EXAMPLES = (Delora(), Delora(r=3, target_modules="all-linear", module_dropout=0.1))
UNVERIFIED: dict[str, str] = {}
