"""fms-acceleration's fused operations and kernels: Unsloth's LoRA functions and kernels of early 2024, with dropout.

Trains: LoRA on a quantized base through fused functions; anything else with the kernels alone.
Keeps for backward: of adapted projections their input, and it once more for each one as dropout left it; a norm its
input and one fp32 number a row; the fast loss the scores, over which it writes their gradient.
Not modelled: mixtures of experts; GPTQ layers other than those of auto_gptq (triton_v2).

foundation-model-stack/fms-acceleration at 876e2ed (2026-01-30), read: plugins/fused-ops-and-kernels. Settings are those
of `fused_ops_and_kernels`, here all on. Norms' weights get no gradient from the fast norm, trained or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftplan.arch.core import Arch, Attention
from peftplan.errors import RequestError
from peftplan.graph.blocks.kernels import Asked, Kernels, Layout, Loss, Pair
from peftplan.graph.blocks.loss import LossStyle
from peftplan.graph.builder import Builder
from peftplan.graph.core import Graph, Tensor
from peftplan.kernels import _lora, _triton
from peftplan.kernels._fused_linear import fused_loss
from peftplan.plugins import canonical
from peftplan.units import DType

MODELS = ("gpt_bigcode", "granite", "granitemoe", "granitemoeshared", "granitemoehybrid", "llama", "mistral", "mixtral")
"""framework_plugin_fast_kernels.py, restricted_model_archs."""
STYLE = _lora.Style(keeps_dropped=True, adds_in_place=False, holds_whole=False, products_back=(3, 3))


@dataclass(frozen=True, kw_only=True)
class Foak(Kernels):
    """Which of the plug-in's parts are on."""

    fused_lora: bool = True
    fast_loss: bool | Literal["fused_ce_liger"] = True
    fast_rms_layernorm: bool = True
    fast_rope_embeddings: bool = True

    def check(self, asked: Asked) -> None:
        if asked.arch.family not in MODELS:
            raise RequestError(f"fms-acceleration has no fused operations for {asked.arch.family}; use --kernels hf")
        if self.fused_lora and asked.packed and canonical(asked.format) not in ("", "nf4", "gptq"):
            raise RequestError(
                f"fms-acceleration's fused LoRA takes bitsandbytes' NF4 or AutoGPTQ, not {asked.format}; "
                "set kernels.fused_lora=false"
            )
        if asked.packed and asked.autocast is None:
            raise RequestError(
                "fms-acceleration requires mixed precision on a quantized model; use --precision bf16-mixed"
            )

    @property
    def owns_loss(self) -> bool:
        return self.fast_loss == "fused_ce_liger"

    @property
    def in_place(self) -> bool:
        return self.fast_rope_embeddings

    def norm(self, b: Builder, arch: Arch, x: Tensor, weight: Tensor) -> Tensor:
        if not self.fast_rms_layernorm:
            return super().norm(b, arch, x, weight)
        return _triton.rms_norm(b, x, weight, trains=False)

    def rotate(self, b: Builder, a: Attention, q: Tensor, k: Tensor, table: Pair, *, by_head: Layout) -> Pair:
        own = _triton.rotate_each if self.fast_rope_embeddings else super().rotate
        return own(b, a, q, k, table, by_head=by_head)

    def loss(self, b: Builder, hidden: Tensor, head: Tensor, labels: Tensor, style: LossStyle) -> Loss:
        """lce_forward: the last token of each row is cut off in a copy; Liger 0.4's fused function."""
        if self.fast_loss != "fused_ce_liger":
            return super().loss(b, hidden, head, labels, style)
        size, seq, width = hidden.shape
        with b.marked("loss"):
            part = b.slice(hidden, size, seq - 1, width, label="but_last")
            rows = b.copy(part, label="shift_hidden").view(size * (seq - 1), width)
            targets = b.plain("shift_labels", size * (seq - 1), dtype=DType.int64, ins=(labels,))
            loss = fused_loss(b, rows, head, targets, upcast=True)
            b.hold(hidden, rows, targets)
        return loss, ()

    def cross_entropy_of(self, b: Builder, scores: Tensor, targets: Tensor) -> Tensor:
        if self.fast_loss is not True:
            return super().cross_entropy_of(b, scores, targets)
        return _triton.fast_cross_entropy(b, scores, targets)

    def fuse(self, graph: Graph) -> Graph:
        """Only on quantized weights: otherwise the plug-in leaves fused LoRA out."""
        return _lora.fused(graph, STYLE, lambda one: one.packed) if self.fused_lora else graph


KERNELS = Foak
EXAMPLES = (Foak(), Foak(fast_loss="fused_ce_liger"), Foak(fused_lora=False, fast_rms_layernorm=False))
UNVERIFIED: dict[str, str] = {}
