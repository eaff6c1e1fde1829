"""Liger: Triton kernels for norms, rotary embeddings, gated products and the loss (Hsu et al. 2024, arXiv:2410.10989).

Trains: anything; PEFT's adapters sit on the linear layers, which stay transformers' own.
Keeps for backward: a norm its input and one fp32 number a row; a gated product its two inputs; a rotary embedding its
tables; the fused loss the gradients themselves, no logits.
Not modelled: layer norm, mixtures of experts, `model_init_kwargs.use_kernels`; the Blackwell backends, which keep the
same.

liger-kernel 0.8.5, read: ops/*.py, transformers/monkey_patch.py, transformers/model/*.py. Settings are those of
`liger_kernel_config`, defaults those of `apply_liger_kernel_to_llama` and its siblings; `swiglu` stands for Gemma's
`geglu` too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftplan.arch.core import Arch, Attention
from peftplan.errors import RequestError
from peftplan.graph.blocks.kernels import Asked, Kernels, Layout, Loss, Make, Pair
from peftplan.graph.blocks.loss import LossStyle, shifted_labels
from peftplan.graph.builder import Builder
from peftplan.graph.core import ACTIVATION, Grad, Tensor
from peftplan.graph.ops import Fused
from peftplan.kernels import _triton
from peftplan.kernels._fused_linear import fused_loss
from peftplan.units import DType

FP32 = DType.float32
PATCHED = (
    "deepseek_v2", "deepseek_v3", "exaone4", "falcon_h1", "gemma", "gemma2", "gemma3", "gemma3_text", "glm4", "gpt_oss",
    "granite", "hunyuan_v1_dense", "llama", "llama4_text", "ministral", "mistral", "mixtral", "nemotron", "olmo2",
    "olmo3", "phi3", "qwen2", "qwen3", "qwen3_5", "qwen3_moe", "qwen3_next", "smollm3",
)  # fmt: skip
"""Text models in liger-kernel 0.8.5, monkey_patch.py, MODEL_TYPE_TO_APPLY_LIGER_FN."""


@dataclass(frozen=True, kw_only=True)
class Liger(Kernels):
    """Which of transformers' functions Liger's stand in for."""

    rope: bool = True
    rms_norm: bool = True
    swiglu: bool = True
    cross_entropy: bool = False
    fused_linear_cross_entropy: bool = True
    accum_dtype: Literal["float32"] | None = None
    """In which dtype the fused loss sums the head's gradient, if not in the head's own."""

    def check(self, asked: Asked) -> None:
        if self.cross_entropy and self.fused_linear_cross_entropy:
            raise RequestError(
                "kernels.cross_entropy and kernels.fused_linear_cross_entropy cannot both be true (Liger); "
                "set one of them false"
            )
        if asked.arch.family == "granite" and self.fused_linear_cross_entropy:
            raise RequestError(
                "LigerFusedLinearCrossEntropy is not available for Granite models (Liger); set "
                "kernels.fused_linear_cross_entropy=false, and kernels.cross_entropy=true as Liger does"
            )
        if asked.arch.family not in PATCHED:
            raise RequestError(f"Liger has no kernels for {asked.arch.family} and leaves it as it is; use --kernels hf")

    @property
    def owns_loss(self) -> bool:
        return self.fused_linear_cross_entropy

    @property
    def in_place(self) -> bool:
        return self.rope

    def norm(self, b: Builder, arch: Arch, x: Tensor, weight: Tensor) -> Tensor:
        return _triton.rms_norm(b, x, weight, trains=True) if self.rms_norm else super().norm(b, arch, x, weight)

    def rotate(self, b: Builder, a: Attention, q: Tensor, k: Tensor, table: Pair, *, by_head: Layout) -> Pair:
        own = _triton.rotate if self.rope else super().rotate
        return own(b, a, q, k, table, by_head=by_head)

    def glu(self, b: Builder, gate: Make, up: Make) -> Tensor:
        return _triton.glu(b, gate, up) if self.swiglu else super().glu(b, gate, up)

    def glu_of_halves(self, b: Builder, gate: Tensor, up: Tensor) -> Tensor:
        """LigerPhi3SwiGLUMLP: the halves are made contiguous first."""
        if not self.swiglu:
            return super().glu_of_halves(b, gate, up)
        return _triton.product(b, b.copy(gate, label="gate_dense"), b.copy(up, label="up_dense"))

    def loss(self, b: Builder, hidden: Tensor, head: Tensor, labels: Tensor, style: LossStyle) -> Loss:
        if not self.fused_linear_cross_entropy:
            return super().loss(b, hidden, head, labels, style)
        with b.marked("loss"):
            targets, padded = shifted_labels(b, labels)
            rows = hidden.view(hidden.numel // hidden.shape[-1], hidden.shape[-1])
            loss = fused_loss(b, rows, head, targets, accumulate=FP32 if self.accum_dtype else None)
            b.hold(padded, targets, hidden)
        return loss, ()

    def cross_entropy_of(self, b: Builder, scores: Tensor, targets: Tensor) -> Tensor:
        """LigerCrossEntropyFunction: the gradient is written over the scores in the forward, and returned as it is."""
        if not self.cross_entropy:
            return super().cross_entropy_of(b, scores, targets)
        rows = scores.numel // scores.shape[-1]
        loss = Tensor("loss", (), FP32, ACTIVATION)
        grads = (Grad(scores, scores.nbytes, 0, scores),)
        losses = rows * (FP32.size + 1 + 2 * DType.int64.size)  # and which targets count, and those targets twice
        return _triton.emit(
            b,
            Fused(name="loss", ins=(scores, targets), out=loss, keeps=(scores,), grads=grads, temporary_bytes=losses,
                  site="loss"),
        )  # fmt: skip


KERNELS = Liger
EXAMPLES = (
    Liger(),
    Liger(cross_entropy=True, fused_linear_cross_entropy=False),
    Liger(rope=False, rms_norm=False, swiglu=False),
)
UNVERIFIED: dict[str, str] = {}
