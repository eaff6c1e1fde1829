"""LoRA's branch and its variants that put something between A and B, or compute A or B otherwise.

Mirrors peft/tuners/lora/layer.py Linear.forward and peft/tuners/lora/variants.py KasaLinearVariant.forward and
BdLoraLinearVariant.forward, peft 0.21.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from peftplan.errors import RequestError
from peftplan.graph.builder import Builder
from peftplan.graph.core import ADAPTER, Tensor
from peftplan.graph.edit import Module
from peftplan.graph.ops import Embedding, PackedLinear
from peftplan.graph.spread import between
from peftplan.units import DType

UNSET = Tensor("", (), DType.boolean)


class Branch(NamedTuple):
    """One adapter, and what LoRA's forward has at hand when it calls a variant."""

    module: Module
    base: Tensor
    """The result so far: the base layer's output (its clone, where PEFT clones it), with earlier adapters' changes."""
    x: Tensor
    """The module's input in the adapter's dtype."""
    number: int
    trains: bool
    dropout: float
    a: Tensor = UNSET
    up: Tensor = UNSET
    bias: Tensor | None = None
    kernel: PackedLinear | None = None

    def weight(self, b: Builder, label: str, *shape: int, dtype: DType) -> Tensor:
        """A weight of this adapter."""
        name = f"{label}.{self.number}" if self.number else label
        return b.weight(name, *shape, dtype=dtype, kind=ADAPTER)._replace(trainable=self.trains)


Variant = Callable[[Builder, Branch], Tensor]
"""The result with the adapter's change added, not yet in the base's dtype."""


def change(b: Builder, branch: Branch, *, scaled: bool = True) -> Tensor:
    """scaling B(A(dropout(x))), or that before it is `scaled`."""
    with b.marked(branch.module.site, "down"):
        down = b.linear(b.dropout(branch.x, branch.dropout), branch.a, label="lora_A")
    down = between(b, down, branch.module.site)
    with b.marked(branch.module.site, "up"):
        up = b.linear(down, branch.up, branch.bias, label="lora_B")
        return b.scale(up) if scaled else up


def plain(b: Builder, branch: Branch) -> Tensor:
    """LoRA itself."""
    delta = change(b, branch)
    with b.marked(branch.module.site, "extra"):
        return b.add(branch.base, delta, label="sum")


CONVERTED = ("awq", "aqlm")
"""Libraries on whose layers PEFT casts what B returns to the layer's dtype before it scales it (lora/awq.py, aqlm.py);
on GPTQ's it does as on a plain layer (lora/gptq.py)."""


def pooled(b: Builder, branch: Branch) -> Tensor:
    """QA-LoRA (QALoraLinearVariant.forward): A reads the means of groups of inputs, as many as A is wide."""
    groups, wide = branch.a.shape[1], branch.module.in_features
    with b.marked(branch.module.site, "down"):
        x = b.dropout(branch.x, branch.dropout)
        mean = b.mean_last(x.view(x.numel // wide, groups, wide // groups))
        given = b.scale(mean.view(*branch.x.shape[:-1], groups), label="pooled")
        down = b.linear(given, b.alias(branch.a), label="lora_A")
    with b.marked(branch.module.site, "up"):
        delta = b.scale(b.linear(down, b.alias(branch.up), label="lora_B"))
    with b.marked(branch.module.site, "extra"):
        total = b.add(branch.base, delta, label="sum")
        b.hold(x, mean, given, delta)
    return total


_FROM_WEIGHTS = ("pissa", "olora", "corda", "loftq", "mica", "lora_ga")
_FROM_SHAPES = ("orthogonal",)
"""Initialisations that ask for a layer's weight, for its values or for its dtype; GPTQ's say the latter."""


def check_start(start: bool | str, layer: str) -> None:
    """Raises RequestError for an initialisation that PEFT cannot make on the layers of a library."""
    asks = _FROM_WEIGHTS if layer == "gptq" else (*_FROM_WEIGHTS, *_FROM_SHAPES)
    if isinstance(start, str) and start.lower().startswith(asks):
        raise RequestError(
            f"method.init_lora_weights={start}: PEFT starts it from a layer's weight, which the layers of {layer} do "
            "not have; leave it out"
        )


def cast_first(b: Builder, branch: Branch, layer: str, *, casts: bool) -> Tensor:
    """LoRA as PEFT adds it to those layers' outputs, in place to AQLM's."""
    with b.marked(branch.module.site, "down"):
        down = b.linear(b.dropout(branch.x, branch.dropout), branch.a, label="lora_A")
    with b.marked(branch.module.site, "up"):
        delta = b.linear(down, branch.up, branch.bias, label="lora_B")
    with b.marked(branch.module.site, "extra"):
        delta = b.scale(b.cast(delta, branch.base.dtype, label="delta") if casts else delta)
        total = (b.add_into if layer == "aqlm" else b.add)(branch.base, delta, label="sum")
        b.hold(delta)
        return total


def embedded(b: Builder, branch: Branch, scale: Tensor | None) -> Tensor:
    """Embedding.forward: rows of A's transpose are looked up, and multiplied by B's; `scale`
    is the buffer that the base's rows are multiplied by, if they are."""
    (vocab, hidden), rank = branch.module.weight.shape, branch.a.shape[0]
    ids = branch.module.x
    with b.marked(branch.module.site, "down"):
        rows = b.view(b.alias(branch.a), vocab, rank, label="lora_embedding_A_T", grad_copied=True)
        name = b.name("after_A")
        after = Tensor(name, (*ids.shape, rank), branch.a.dtype)
        b.ops.append(Embedding(name=name, ins=(ids, rows), out=after, site=branch.module.site, part="down"))
    with b.marked(branch.module.site, "up"):
        back = b.view(b.alias(branch.up), hidden, rank, label="lora_embedding_B_T")
        delta = b.scale(b.linear(after, back, label="times_B"))
        if scale is not None:
            delta = b.mul(delta, b.cast(scale, delta.dtype, label="embed_scale"), label="delta_scaled")
    with b.marked(branch.module.site, "extra"):
        total = b.add(branch.base, delta, label="sum")
        b.hold(rows, back, after, delta)
    return total


def kasa(b: Builder, branch: Branch) -> Tensor:
    """KaSA: a trained diagonal of singular values between A and B (arXiv:2412.06071)."""
    diagonal = branch.weight(b, "lora_diag", branch.a.shape[0], dtype=branch.a.dtype)
    with b.marked(branch.module.site, "down"):
        after = b.linear(b.dropout(branch.x, branch.dropout), branch.a, label="lora_A")
        scaled = b.mul(after, diagonal, label="times_diag")
    with b.marked(branch.module.site, "up"):
        delta = b.scale(b.linear(scaled, branch.up, branch.bias, label="lora_B"))
    with b.marked(branch.module.site, "extra"):
        total = b.add(branch.base, delta, label="sum")
        b.hold(after)
    return total


@dataclass(frozen=True)
class BdLora:
    """PEFT's BdLoraConfig: A or B of blocks on the diagonal."""

    target_modules_bd_a: tuple[str, ...] | None = None
    target_modules_bd_b: tuple[str, ...] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def shape(self, path: str, side: str, *shape: int) -> tuple[int, int]:
        """The shape of the weight `side` (`a` or `b`) of the module `path`. Raises RequestError where PEFT does."""
        out, wide = shape
        if self._side(path) != side:
            return out, wide
        if out % self.nblocks or wide % self.nblocks:
            raise RequestError(
                f"method.use_bdlora: nblocks={self.nblocks} does not divide {out} and {wide} of {path}; use a divisor"
            )
        return out, wide // self.nblocks

    def _side(self, path: str) -> str | None:
        sides = [side for side, names in (("a", self.target_modules_bd_a), ("b", self.target_modules_bd_b))
                 if any(name in path for name in names or ())]  # fmt: skip
        if len(sides) == 2:
            raise RequestError(f"method.use_bdlora: {path} is named for A and for B; name it once")
        if not sides and self.match_strict:
            raise RequestError(
                f"method.use_bdlora: {path} is named neither for A nor for B; name it, or set match_strict to false"
            )
        return sides[0] if sides else None


def block_diagonal(b: Builder, branch: Branch) -> Tensor:
    """BD-LoRA: `result += scaling B(A(dropout(x)))`, where A or B may be blocks on the diagonal."""
    wide, rank = branch.module.in_features, branch.a.shape[0]
    with b.marked(branch.module.site, "down"):
        given = b.dropout(branch.x, branch.dropout)
        down = _blocks(b, given, branch.a, wide, "lora_A")
    with b.marked(branch.module.site, "up"):
        delta = b.scale(_blocks(b, down, branch.up, rank, "lora_B"))
    with b.marked(branch.module.site, "extra"):
        total = b.add_into(branch.base, delta, label="sum")
        b.hold(given)
    return total


def _blocks(b: Builder, x: Tensor, weight: Tensor, wide: int, label: str) -> Tensor:
    """BlockDiagonalLinear.forward: einsum("bim,inm->bin") is a product per block, whose output is then laid out by
    token; a plain linear layer where the weight is whole."""
    if weight.shape[1] == wide:
        return b.linear(x, weight, label=label)
    out, inner = weight.shape
    count, tokens = wide // inner, x.numel // wide
    rows = b.view(x, count, tokens, inner, label=f"{label}_blocks", grad_copied=True)
    matrices = b.view(b.alias(weight), count, inner, out // count, label=f"{label}_weights", grad_copied=True)
    made = b.matmul(rows, matrices, count, tokens, out // count, inner=inner, label=label)
    return b.copy(made, *x.shape[:-1], out, label=f"{label}_out", grad_copied=False)
