"""SuperTuning: the largest elements of each weight train, in place (arXiv:2607.09287).

Trains: in out (1 - sparsity) numbers per adapted linear layer, and r (in + out) where `r` is given; plus copies of
`modules_to_save`.
Keeps for backward: the layer's input, and a whole copy of its weight with the numbers added, in the model's dtype; the
numbers' places (int64). Beside the weights lie the places (int32).
Not modelled: embeddings, packed bases (PEFT fails on them).
Mirrors peft/tuners/supertuning/layer.py Linear.forward and update_layer, peft 0.21.2. The base layer is not called.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Grad, Op, Tensor
from peftplan.graph.edit import Module
from peftplan.methods._branches import Chosen, OnLinears, bias_of, builder, check_rank, check_share
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Family, Host
from peftplan.units import DType

HARMLESS = COMMON | {"select_top", "lora_alpha", "init_weights", "save_precomputed_indices"}


@final
@dataclass(frozen=True)
class Supertuning(OnLinears):
    """PEFT's SupertuningConfig; with `r`, LoRA beside it."""

    sparsity: float = 0.99
    r: int | None = None
    lora_dropout: float = 0.0
    family: ClassVar[Family] = "selective"
    title: ClassVar[str] = "SuperTuning"
    no_4bit: ClassVar[str] = "PEFT multiplies by the packed weight itself, and torch does not mix integers in"
    no_8bit: ClassVar[str] = no_4bit
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform")

    def check(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise RequestError(f"method.sparsity={self.sparsity}: must be at least 0 and below 1")
        if self.r is not None:
            check_rank(self.r)
        check_share("lora_dropout", self.lora_dropout)

    def _count(self, module: Module) -> int:
        count = int(module.weight.numel * (1 - self.sparsity))
        if count < 1:
            raise RequestError(f"method.sparsity={self.sparsity} leaves nothing of {module.path} to train; lower it")
        return count

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        del host
        return (Tensor("@supertuning_indices", (sum(self._count(c.module) for c in chosen),), DType.int32, BUFFER),)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, _ = builder(module, host)
        count, weight = self._count(module), module.weight
        values = b.weight("supertuning_values", count, dtype=host.new_dtype, kind=ADAPTER)
        with b.marked(module.site, "down"):
            places = b.plain("places", count, dtype=DType.int64)
            given = b.cast(values, weight.dtype, label="values")
            new = Tensor("", weight.shape, weight.dtype)
            new = b.formula(
                "new_weight", new, weight, given, keeps=(places,), grads=(Grad(given, given.logical_bytes),)
            )
            out = b.linear(module.x, new, bias_of(module), label="supertuned")
        with b.marked(module.site, "extra"):
            held = () if self.r is None else self._lora(b, module, host, out)
            out = held[-1] if held else out
            b.hold(new, places, given, *held[:-1], module.x)
        return ended(b, out, module, name=self.title)

    def _lora(self, b: Builder, module: Module, host: Host, result: Tensor) -> tuple[Tensor, ...]:
        """LoRA's input and output, and the result with it."""
        rank, dtype = self.r or 0, host.new_dtype
        a = b.weight("supertuning_lora_A.weight", rank, module.in_features, dtype=dtype, kind=ADAPTER)
        up = b.weight("supertuning_lora_B.weight", module.out_features, rank, dtype=dtype, kind=ADAPTER)
        x = b.cast(b.dropout(module.x, self.lora_dropout), dtype, label="lora_x")
        change = b.linear(b.linear(x, a, label="lora_A"), up, label="lora_B")
        scaled = b.cast(b.scale(change, label="scaled"), result.dtype, label="lora_cast")
        return x, change, b.add(result, scaled, label="sum")


METHOD = Supertuning
EXAMPLES = (Supertuning(sparsity=0.9), Supertuning(sparsity=0.5, target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
