"""Whose implementation each group of a decoder's operations has: norm, rotary embedding, gated product, loss.

`Kernels` is what transformers computes with by itself. A library that puts functions of its own in place of some
of it is a subclass with settings that say which (`peftplan/kernels/`, one file each); blocks ask the one they have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from peftplan.arch.core import Arch, Attention
from peftplan.errors import Unsupported
from peftplan.graph.blocks.loss import LossStyle, causal_lm_loss, cross_entropy, fused_head_loss, returned_logits
from peftplan.graph.builder import Builder
from peftplan.graph.chunked_loss import chunked_loss, split_loss
from peftplan.graph.core import Graph, Tensor
from peftplan.graph.spread import entering, gathered, rows_of
from peftplan.units import DType

FP32 = DType.float32
Make = Callable[[], Tensor]
"""Runs a projection, when it is its turn."""
Pair = tuple[Tensor, Tensor]
Layout = tuple[bool, bool]
"""Of queries and of keys: whether memory has them as (B, N, S, D), and not as projected."""
Loss = tuple[Tensor, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a library may refuse to run on."""

    arch: Arch
    method: str
    """The method's file name."""
    knobs: Mapping[str, Any]
    """The method's settings."""
    format: str
    autocast: DType | None
    packed: bool
    """Whether the format packs weights."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """transformers' own implementations."""

    replaces: ClassVar[bool] = True
    """Whether a subclass has functions of a library's own."""

    repeat_kv: bool = False
    """Whether flash attention is given keys and values once for every query head, as Mistral's was until transformers
    4.47 (4.45.2, modeling_mistral.py, MistralFlashAttention2.forward)."""

    def check(self, asked: Asked) -> None:
        """Raise RequestError or Unsupported, with the library's reason, for what it does not run on."""

    @property
    def owns_loss(self) -> bool:
        """Whether the loss is the library's, so that no `loss.style` applies."""
        return False

    def norm(self, b: Builder, arch: Arch, x: Tensor, weight: Tensor) -> Tensor:
        """LlamaRMSNorm.forward / GemmaRMSNorm.forward: computed in fp32 whatever x is."""
        x32 = b.cast(x, FP32, label="x32")
        mean = b.mean_last(b.square(x32))
        inverse = b.rsqrt(b.add_const(mean))
        normed = b.mul(x32, inverse, label="normed")
        if arch.norm == "rms_plus_one":
            gain = b.add_const(b.cast(weight, FP32, label="w32"), label="gain")
            scaled = b.mul(normed, gain, label="scaled")
            out = b.cast(scaled, x.dtype, label="out")
            b.hold(scaled)
            return out
        out = b.mul(weight, b.cast(normed, x.dtype, label="xhat"), label="out")
        b.hold(normed, mean)
        return out

    @property
    def in_place(self) -> bool:
        """Whether rotary embeddings turn queries and keys where they are, as projected."""
        return False

    def rotate(self, b: Builder, a: Attention, q: Tensor, k: Tensor, table: Pair, *, by_head: Layout) -> Pair:
        """apply_rotary_pos_emb of per-head queries and keys with the cosines and sines of `table`. Their gradients
        come back as `by_head` says."""
        del by_head
        turned = (_rotary(b, q, a, table, "q_rope"), _rotary(b, k, a, table, "k_rope"))
        b.hold(q, k)
        return turned

    def glu(self, b: Builder, gate: Make, up: Make) -> Tensor:
        """LlamaMLP.forward up to its last projection: act(gate(x)) * up(x)."""
        act = b.activate(gate())
        return b.mul(act, up(), label="glu")

    def glu_of_halves(self, b: Builder, gate: Tensor, up: Tensor) -> Tensor:
        """The same of two views of one projection (Phi3MLP.forward)."""
        return b.mul(up, b.activate(gate), label="glu")

    def loss(self, b: Builder, hidden: Tensor, head: Tensor, labels: Tensor, style: LossStyle) -> Loss:
        """lm_head and the loss of (B, S, H) hidden states: the loss, and names of what the model returns besides."""
        if style == "fused_head":
            return fused_head_loss(b, hidden, head, labels), ()
        if style in ("chunked", "split"):
            own = chunked_loss if style == "chunked" else split_loss
            return own(b, hidden, head, labels), ()
        with b.marked("head"):
            logits = b.linear(entering(b, hidden, "head"), rows_of(b, head), label="lm_head")
            logits = gathered(b, logits, head.shape[0], "head")
        loss = causal_lm_loss(b, logits, labels, hidden, style, criterion=self.cross_entropy_of)
        return loss, (returned_logits(style, logits),)

    def cross_entropy_of(self, b: Builder, scores: Tensor, targets: Tensor) -> Tensor:
        """From fp32 scores and targets, one row a token, to the scalar loss."""
        return cross_entropy(b, scores, targets)

    def fuse(self, graph: Graph) -> Graph:
        """The graph with the method's operations where the library has functions of its own for them."""
        return graph


TRANSFORMERS = Kernels()


def only_transformers(kernels: Kernels, what: str) -> None:
    """Raises Unsupported where a library's functions would run on `what`, which is modelled without them alone."""
    if kernels is not TRANSFORMERS and kernels.replaces:
        raise Unsupported(f"a library's kernels on {what} are not modelled; use --kernels hf")


def _rotary(b: Builder, x: Tensor, a: Attention, table: Pair, label: str) -> Tensor:
    """apply_rotary_pos_emb for one of q, k (Su 2021, arXiv:2104.09864); partial rotary concatenates the rest."""
    with b.scope(label):
        if not a.rotary_concat:
            return _turned(b, x, table)
        dim = a.rotary_dim or a.head_dim
        part = b.slice(x, *x.shape[:-1], dim, label="rot")
        rest = b.slice(x, *x.shape[:-1], a.head_dim - dim, label="pass")
        return b.concat((_turned(b, part, table), rest), *x.shape)


def _turned(b: Builder, x: Tensor, table: Pair) -> Tensor:
    """x cos + rotate_half(x) sin."""
    cos, sin = table
    straight = b.mul(x, cos, label="x_cos")
    turned = b.mul(b.rotate_half(x), sin, label="x_sin")
    return b.add(straight, turned, label="sum")
