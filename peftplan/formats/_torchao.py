"""torchao's tensor classes for 8 bit: what they hold, and the operators that torch.nn.functional.linear becomes.

Mirrors torchao 0.18.0, quantization/quant_api.py (the configs that transformers' TorchAoConfig takes) and
quantize_/workflows: the module stays a torch.nn.Linear whose weight is a tensor of torchao's class, so PEFT puts its
plain layers on it (lora/torchao.py, TorchaoLoraLinear, is one of them). F.linear is not one autograd node but the
operators it is written in, so autograd keeps what these read: the dequantized weight, once per layer.
What it hands on is a view; the copy that a sum in place on it costs the backward (C3A, X-LoRA) is not modelled and
errs low by one input. `prepare` turns gradient checkpointing on and casts nothing (peft/utils/other.py,
prepare_model_for_kbit_training).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from peftplan.errors import RequestError
from peftplan.formats._packing import biases, pack
from peftplan.formats.base import Format, Piece
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import Graph, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import DetachedLinear
from peftplan.units import DType


@dataclass(frozen=True)
class TorchAo8(Format, ABC):
    """Settings of torchao's 8-bit configs."""

    granularity: Literal["row", "tensor"] = "row"
    """torchao's PerRow and PerTensor."""
    group_size: int | None = None
    """torchao's PerGroup, which takes the place of the granularity."""
    activations: Literal["none", "dynamic"] = "none"
    """dynamic: the layer's input is quantized too, per row or tensor as the weight is."""
    prepare: bool = False
    """Whether peft.prepare_model_for_kbit_training runs before the adapter is put on."""
    constant_bytes: ClassVar[int]
    """Of one scale and what comes with it."""

    @property
    def packed(self) -> bool:
        return True

    @property
    def prepares(self) -> bool:
        return self.prepare

    @property
    def cuts(self) -> bool:
        return self.activations == "dynamic"

    def constants(self, rows: int, columns: int) -> int:
        """How many scales a weight has. Raises RequestError where its rows are not a number of groups."""
        if self.group_size is None:
            return rows if self.granularity == "row" else 1
        if self.activations == "dynamic":
            raise RequestError(
                "format.group_size: torchao has dynamic activations per row or tensor only; leave it out"
            )
        if self.group_size < 1 or columns % self.group_size:
            raise RequestError(f"format.group_size={self.group_size} does not divide {columns} inputs; use a divisor")
        return rows * (columns // self.group_size)

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of one packed weight with its constants."""
        return rows * columns + self.constant_bytes * self.constants(rows, columns)

    def pieces(self, weight: Tensor) -> tuple[Piece, ...]:
        """The weight times its inverse scales and rounded, both in fp32, then the packed weight."""
        rows, columns = weight.shape
        wide = Piece(4 * weight.numel, stays=False)
        return Piece(self.constant_bytes * self.constants(rows, columns)), wide, wide, Piece(weight.numel)

    def apply(self, graph: Graph, compute: DType, numerics: Numerics) -> Graph:
        del compute
        self.check(numerics)

        def stand_in(module: Module) -> tuple[Op, ...]:
            weight = module.weight._replace(stored_bytes=self.stored_bytes(*module.weight.shape), trainable=False)
            b = Builder(numerics, f"{module.path}.base_")  # apart from what a method names
            with b.marked(module.site):
                out = self.dynamic(b, module, weight) if self.cuts else self.weight_only(b, module, weight)
            return writing(b.ops, out, module.out)

        return pack(graph, stand_in)

    def check(self, numerics: Numerics) -> None:
        """Raises RequestError for a device that torchao's kernels refuse."""

    @abstractmethod
    def weight_only(self, b: Builder, module: Module, weight: Tensor) -> Tensor:
        """The module's output, from the operators that F.linear becomes."""

    @abstractmethod
    def dynamic_bytes(self, tokens: int, rows: int, columns: int, b: Builder) -> int:
        """What a product of quantized activations takes at once beside its output (before its bias)."""

    def dynamic(self, b: Builder, module: Module, weight: Tensor) -> Tensor:
        """Quantizing is written without a gradient, so none goes through the layer and nothing is kept for one."""
        x, (rows, columns) = module.x, weight.shape
        name = b.name("product")
        work = self.dynamic_bytes(x.numel // columns, rows, columns, b)
        out = Tensor(name, (*x.shape[:-1], rows), x.dtype)
        b.ops.append(
            DetachedLinear(name=name, ins=(x, weight), out=out, site=module.site, temporary_bytes=max(0, work))
        )
        for bias in biases(module):
            out = b.add(out, bias, label="biased")
        return out
