"""GLoRA: the weight changes by a part of itself and by a new one (Chavan 2023, arXiv:2306.07967).

Trains: 2 r (in + out) per adapted linear layer with config_A_B=lora, 2 out with vector, 2 with constant; where it has a
bias also r (in + 1) or in numbers (config_C), and 2 out or 2 (config_D_E); plus copies of `modules_to_save`.
Keeps for backward: the layer's input and its whole new weight, in the model's dtype; the layer runs twice.
Not modelled: config_A_B=none, embeddings, packed bases (PEFT fails on them).
Mirrors peft/tuners/glora/layer.py GloraLinear.forward and GloraLayer.update_layer, peft 0.21.2. The parts that a layer
without bias has no use for are buffers of zeros.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, BUFFER, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.methods._branches import Chosen, OnLinears, bias_of, builder, check_rank
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host

HARMLESS = COMMON | {"init_weights"}


@final
@dataclass(frozen=True)
class Glora(OnLinears):
    """PEFT's GloraConfig."""

    r: int = 8
    config_A_B: Literal["lora", "vector", "constant"] = "lora"  # noqa: N815 (PEFT's name)
    config_C: Literal["lora", "vector", "none"] = "lora"  # noqa: N815 (PEFT's name)
    config_D_E: Literal["vector", "constant", "none"] = "constant"  # noqa: N815 (PEFT's name)
    bias: Literal["none"] = "none"
    title: ClassVar[str] = "GLoRA"
    no_4bit: ClassVar[str] = "PEFT takes plain torch.nn.Linear only"
    no_8bit: ClassVar[str] = no_4bit
    lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform")

    def check(self) -> None:
        check_rank(self.r)

    def buffers(self, chosen: Collection[Chosen], host: Host) -> tuple[Tensor, ...]:
        count = sum(self._zeros(c.module) for c in chosen)
        return (Tensor("@glora_zeros", (count,), host.base_dtype, BUFFER),)

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        b, base = builder(module, host)
        weight = module.weight
        with b.marked(module.site, "down"):
            own, new = (b.cast(self._path(b, module, host, n), weight.dtype, label=n) for n in ("A", "B"))
            changed = b.add(weight, b.mul(weight, own, label="own_part"), label="changed")
            effective = b.add(changed, new, label="effective")
            bias, held = self._bias(b, module, host)
            adapted = b.linear(module.x, effective, bias, label="adapted")
        with b.marked(module.site, "extra"):
            total = b.minus(b.add(base, adapted, label="sum"), b.scale(base, label="once"), label="rest")
            out = b.cast(total, base.dtype, label="out")
            b.hold(base, own, new, *held, effective, adapted, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, out, module, name=self.title))

    def _zeros(self, module: Module) -> int:
        """How many numbers the parts hold that do not train: those of the bias, where there is none."""
        biased, wide, out = bias_of(module) is not None, module.in_features, module.out_features
        c = 0 if biased and self.config_C != "none" else wide
        return c + (0 if biased and self.config_D_E != "none" else 2 * out)

    def _bias(self, b: Builder, module: Module, host: Host) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """b + b D + E + W C, and the locals before it."""
        bias, weight = bias_of(module), module.weight
        if bias is None:
            return None, ()
        c = b.cast(self._coupling(b, module, host), weight.dtype, label="C")
        d, e = (b.cast(self._shift(b, module, host, n), weight.dtype, label=n) for n in ("D", "E"))
        changed = b.add(b.add(bias, b.mul(bias, d, label="bias_part"), label="bias_changed"), e, label="bias_moved")
        out, wide = weight.shape
        coupled = b.matmul(weight, c, out, 1, inner=wide, label="coupled").view(out)
        total = b.add(changed, coupled, label="bias_effective")
        return total, (c, d, e, total)

    def _coupling(self, b: Builder, module: Module, host: Host) -> Tensor:
        """C: a product or a column, as long as the input."""
        wide, dtype = module.in_features, host.new_dtype
        if self.config_C == "vector":
            return b.weight("glora_C.X", wide, 1, dtype=dtype, kind=ADAPTER)
        if self.config_C == "none":
            return Tensor("@glora_zeros", (wide, 1), host.base_dtype, BUFFER)
        down = b.weight("glora_C.Xd", wide, self.r, dtype=dtype, kind=ADAPTER)
        up = b.weight("glora_C.Xu", self.r, 1, dtype=dtype, kind=ADAPTER)
        return b.matmul(down, up, wide, 1, inner=self.r, label="product_C")

    def _shift(self, b: Builder, module: Module, host: Host, name: str) -> Tensor:
        """D or E: a row, or one number."""
        if self.config_D_E == "none":
            return Tensor("@glora_zeros", (module.out_features,), host.base_dtype, BUFFER)
        if self.config_D_E == "vector":
            return b.weight(f"glora_{name}.X", module.out_features, dtype=host.new_dtype, kind=ADAPTER)
        return b.slice(b.weight(f"glora_{name}.X", 1, dtype=host.new_dtype, kind=ADAPTER), label="number")

    def _path(self, b: Builder, module: Module, host: Host, name: str) -> Tensor:
        """A or B: a product, a column, or one number."""
        dtype, out, wide = host.new_dtype, module.out_features, module.in_features
        if self.config_A_B == "vector":
            return b.weight(f"glora_{name}.X", out, 1, dtype=dtype, kind=ADAPTER)
        if self.config_A_B == "constant":
            return b.slice(b.weight(f"glora_{name}.X", 1, dtype=dtype, kind=ADAPTER), label="number")
        down = b.weight(f"glora_{name}.Xd", out, self.r, dtype=dtype, kind=ADAPTER)
        up = b.weight(f"glora_{name}.Xu", self.r, wide, dtype=dtype, kind=ADAPTER)
        return b.matmul(down, up, out, wide, inner=self.r, label=f"product_{name}")


METHOD = Glora
EXAMPLES = (Glora(), Glora(config_A_B="vector", target_modules="all-linear"))
UNVERIFIED: dict[str, str] = {}
