"""VB-LoRA: LoRA's matrices put together from a bank of vectors that the whole model shares (Li 2024, arXiv:2405.15179).

Trains: the bank (num_vectors x vector_length) once, and r (in + out) / vector_length x num_vectors logits per adapted
linear layer; plus `bias` and copies of `modules_to_save`.
Keeps for backward: the layer's input in the adapter's dtype, r numbers a token, and for both matrices their topk
vectors, weights and numbers (int64).
Not modelled: embeddings.
Mirrors peft/tuners/vblora/layer.py Linear.forward and _get_low_rank_matrix, peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Grad, Op, Tensor
from peftplan.graph.edit import Module, writing
from peftplan.graph.ops import internal
from peftplan.methods._branches import OnLinears, builder, check_rank, check_share
from peftplan.methods._linears import COMMON, ended
from peftplan.methods.base import Host
from peftplan.methods.targets import DEFAULTS
from peftplan.units import DType

HARMLESS = COMMON | {"save_only_topk_weights", "init_vector_bank_bound", "init_logits_std"}


@final
@dataclass(frozen=True)
class Vblora(OnLinears):
    """PEFT's VBLoRAConfig."""

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    vblora_dropout: float = 0.0
    bias: Literal["none", "all", "vblora_only"] = "none"
    title: ClassVar[str] = "VB-LoRA"
    returns_input: ClassVar[bool] = True
    defaults: ClassVar[dict[str, tuple[str, ...]]] = {
        k: v for k, v in DEFAULTS.items() if k not in ("mistral", "mixtral")
    }

    def trained_biases(self) -> str:
        return self.bias

    def check(self) -> None:
        check_rank(self.r)
        check_share("vblora_dropout", self.vblora_dropout)
        if not 0 < self.topk <= self.num_vectors:
            raise RequestError(f"method.topk={self.topk}: must be 1 to method.num_vectors={self.num_vectors}")

    def branch(self, module: Module, size: int, host: Host) -> tuple[Op, ...]:
        del size
        wide, out, length = module.in_features, module.out_features, self.vector_length
        if length < 1 or wide % length or out % length:
            raise RequestError(f"method.vector_length={length} does not divide both sides of {module.path}")
        b, base = builder(module, host)
        dtype = host.new_dtype
        logits_a = b.weight("vblora_logits_A", self.r, wide // length, self.num_vectors, dtype=dtype, kind=ADAPTER)
        logits_b = b.weight("vblora_logits_B", out // length, self.r, self.num_vectors, dtype=dtype, kind=ADAPTER)
        bank = Tensor("@vblora_vector_bank", (self.num_vectors, length), dtype, ADAPTER, True)
        with b.marked(module.site, "down"):
            b.hold(logits_a, logits_b)  # in the order they are registered in
            bank = b.alias(bank)
            a = self._matrix(b, logits_a, bank).view(self.r, wide)
            up = b.copy(self._matrix(b, logits_b, bank), out, self.r, label="vblora_B")
            x = b.cast(module.x, dtype, label="vblora_x")
            down = b.linear(b.dropout(x, self.vblora_dropout), a, label="down")
        with b.marked(module.site, "up"):
            change = b.linear(down, up, label="up")
        with b.marked(module.site, "extra"):
            result = b.cast(b.add(base, change, label="sum"), module.x.dtype, label="out")
            b.hold(a, up, x, module.x)
        return (*writing(module.ops, module.out, base), *ended(b, result, module, name=self.title))

    def _matrix(self, b: Builder, logits: Tensor, bank: Tensor) -> Tensor:
        """The weighted sum of each tile's topk vectors. topk keeps its numbers (a gradient of zeros, scattered into);
        indexing keeps the same (zeros of the bank, put into)."""
        tiles, length = logits.shape[:-1], self.vector_length
        name = b.name("numbers")
        numbers = internal(name, "indices", (*tiles, self.topk), DType.int64)
        full = Grad(logits, logits.logical_bytes, logits.logical_bytes)
        best = Tensor("", (*tiles, self.topk), logits.dtype)
        best = b.formula("topk", best, logits, keeps=(numbers,), grads=(full,), temporary_bytes=numbers.nbytes)
        weights = b.softmax(best, best.dtype)
        rows = Tensor("", (*tiles, self.topk, length), bank.dtype)
        whole = Grad(bank, bank.logical_bytes, bank.logical_bytes)
        rows = b.formula("vectors", rows, bank, keeps=(numbers,), grads=(whole,))
        scaled = b.mul(weights, rows, label="weighted")
        total = Tensor("", (*tiles, length), scaled.dtype)
        total = b.formula("matrix", total, scaled, grads=(Grad(scaled, 0),))
        b.hold(best, weights)
        return total


METHOD = Vblora
EXAMPLES = (Vblora(vector_length=8, num_vectors=16), Vblora(r=2, vector_length=4, num_vectors=8, topk=3))
UNVERIFIED: dict[str, str] = {}
