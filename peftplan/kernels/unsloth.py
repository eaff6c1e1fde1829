"""Unsloth: LoRA as fused functions, Triton kernels for norms and rotary embeddings, and a loss without logits.

Trains: LoRA and everything; what is not plain LoRA (DoRA, trained biases) runs PEFT's own forward between its kernels.
Keeps for backward: of adapted projections their input, and dropout's masks; of the feed-forward both factors too; a
norm its input and one fp32 number a row; the loss the gradient of the hidden states.
Not modelled: `UNSLOTH_*` environment variables, mixtures of experts, fp8; checkpoints in host memory are a
recomputation policy. Peaks err high by rows that no label counts, which the loss leaves out.

unsloth and unsloth_zoo 2026.10.9, read: unsloth/kernels/*.py, unsloth/models/llama.py, unsloth_zoo/fused_losses. The
forward dequantizes every packed weight into one buffer that stays, as large as the largest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftplan.arch.core import Arch, Attention
from peftplan.errors import RequestError
from peftplan.graph.blocks.kernels import Asked, Kernels, Layout, Loss, Pair
from peftplan.graph.blocks.loss import LossStyle, shifted_labels
from peftplan.graph.builder import Builder
from peftplan.graph.core import BUFFER, Graph, Tensor
from peftplan.graph.ops import PackedLinear
from peftplan.kernels import _lora, _triton
from peftplan.kernels._fused_linear import fused_loss
from peftplan.units import DType

FP32 = DType.float32
MODELS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "cohere", "granite", "falcon_h1")
"""Those with a patched forward of their own: unsloth/models/*.py."""
METHODS = ("lora", "full")
STYLE = _lora.Style(keeps_dropped=False, adds_in_place=True, holds_whole=True, products_back=(2, 3))
_TILE_ROWS, _TILE_WORDS = 4096, 16384
"""unsloth_zoo/fused_losses/fused_linear.py: _BWD_ROWS, _SPLIT_COLS; tiles of 256 MB in fp32."""
_MIN_LOGITS, _MIN_ROWS = 512 * 151_936, 512


@dataclass(frozen=True, kw_only=True)
class Unsloth(Kernels):
    """Its kernels have no switches."""

    def check(self, asked: Asked) -> None:
        family = asked.arch.family
        if family not in MODELS:
            raise RequestError(f"Unsloth has no kernels of its own for {family}; use --kernels hf")
        if asked.method not in METHODS:
            raise RequestError(
                f"Unsloth trains LoRA (get_peft_model) or everything (full_finetuning), not {asked.method}; "
                "use --kernels hf"
            )

    @property
    def owns_loss(self) -> bool:
        return True

    @property
    def in_place(self) -> bool:
        return True

    def norm(self, b: Builder, arch: Arch, x: Tensor, weight: Tensor) -> Tensor:
        """Gemma's gradient is new, any other is written over the incoming one."""
        return _triton.rms_norm(b, x, weight, trains=True, fresh=arch.norm == "rms_plus_one")

    def rotate(self, b: Builder, a: Attention, q: Tensor, k: Tensor, table: Pair, *, by_head: Layout) -> Pair:
        """Turned where they are; their gradients are new."""
        del by_head
        return _triton.rotate(b, a, q, k, table, by_head=(True, True))

    def loss(self, b: Builder, hidden: Tensor, head: Tensor, labels: Tensor, style: LossStyle) -> Loss:
        del style
        with b.marked("loss"):
            targets, padded = shifted_labels(b, labels)
            rows = hidden.view(hidden.numel // hidden.shape[-1], hidden.shape[-1])
            loss = fused_loss(b, rows, head, targets, tile_bytes=_tile_bytes(rows, head))
            b.hold(padded, targets, hidden)
        return loss, ()

    def fuse(self, graph: Graph) -> Graph:
        fused = _lora.fused(graph, STYLE, lambda one: one.x.dtype.is_half and one.weight.dtype is not FP32)
        largest = max(
            (op.ins[1].numel for r in graph.regions for op in r.ops if isinstance(op, PackedLinear)), default=0
        )
        if not largest or fused is graph:
            return fused
        whole = Tensor("@dequantized", (largest,), DType.bfloat16, BUFFER)
        constants = Tensor("@dequantized_absmax", (largest // 64,), FP32, BUFFER)
        return replace(fused, buffers=(*fused.buffers, whole, constants))


def _tile_bytes(rows: Tensor, head: Tensor) -> int:
    """fused_linear_rows, and _tiled_layout for a frozen head from 4,096 rows on: logits in fp32, and with tiles the
    sum of a tile's gradient."""
    (tokens, width), vocab = rows.shape, head.shape[0]
    if tokens >= _TILE_ROWS and not head.trainable and vocab > 2 * _TILE_WORDS:
        return _TILE_ROWS * (_TILE_WORDS + width) * FP32.size
    least = min(max(_power_below(_MIN_LOGITS / vocab), _MIN_ROWS), _TILE_ROWS)
    at_once = min(max(_power_below(tokens * width / vocab), least), _TILE_ROWS, tokens)
    return at_once * (vocab * FP32.size + width * rows.dtype.size)


def _power_below(number: float) -> int:
    return 1 << max(int(number).bit_length() - 1, 0)


KERNELS = Unsloth
EXAMPLES = (Unsloth(),)
UNVERIFIED: dict[str, str] = {}
