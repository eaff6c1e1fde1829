"""What does not run where ranks share a layer's matrices, and how the optimizer steps there."""

from __future__ import annotations

from dataclasses import replace

from peftplan.arch.core import Arch
from peftplan.errors import RequestError, Unsupported
from peftplan.formats import Format
from peftplan.graph.blocks.setup import Setup
from peftplan.kernels.hf import Transformers
from peftplan.layouts import Layout
from peftplan.methods import Method
from peftplan.methods.full import Full
from peftplan.notes import Notes
from peftplan.optimizers import Optimizer
from peftplan.optimizers._megatron import MegatronAdam
from peftplan.optimizers.adamw import AdamW
from peftplan.step.segments import Loop
from peftplan.units import DType

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"})
"""Those whose plan (base_model_tp_plan in transformers' configs) splits query, key, value, gate and up by columns,
output and down by rows, embedding and head by words."""


def check_shared(layout: Layout, arch: Arch, setup: Setup, fmt: Format, method: Method) -> None:
    """Raises RequestError for what the libraries cannot run split, Unsupported for what is not written down."""
    if layout.mesh.plan == "megatron":
        _check_megatron(layout, setup, fmt, method)
        return
    if layout.mesh.tp == 1:
        return
    asked = f"--layout tp={layout.mesh.tp}"
    if fmt.packed:
        raise RequestError(
            f"{asked}: transformers splits weights as DTensors, which bitsandbytes' packed ones are not; use an "
            "unquantized --format, or --layout fsdp"
        )
    if not method.splits:
        raise RequestError(
            f"{asked}: PEFT splits LoRA alone with the layers it is put on (tuners/lora/model.py), and this method "
            "needs whole ones; use lora, lora_fa, full, freeze, bitfit or ln_tuning, or --layout fsdp"
        )
    if not isinstance(setup.kernels, Transformers) or setup.loss == "fused_head":
        raise Unsupported(f"{asked} with kernels or losses of other libraries is not modelled; use --kernels hf")
    if arch.family not in FAMILIES:
        raise Unsupported(
            f"{asked} is modelled for {', '.join(sorted(FAMILIES))} alone, not for {arch.family}; use --layout fsdp"
        )


def _check_megatron(layout: Layout, setup: Setup, fmt: Format, method: Method) -> None:
    asked = "layout.framework=megatron"
    if not isinstance(method, Full):
        raise Unsupported(f"{asked} is modelled for full fine-tuning alone; use --method full, or leave it out")
    if fmt.packed or setup.types.linear is not DType.bfloat16 or setup.numerics.autocast is not None:
        raise Unsupported(f"{asked} is modelled in bf16 alone; use --precision bf16")
    if layout.style not in ("none", "ddp", "zero1"):
        raise Unsupported(
            f"{asked} with {layout.style} is not modelled; use ddp, or zero1 for its distributed optimizer"
        )
    if setup.batch.documents > 1:
        raise Unsupported(f"{asked} on packed rows is not modelled; use --batching exact")
    if layout.mesh.cp > 1 and layout.mesh.context != "ulysses":
        raise Unsupported(f"{asked} with {layout.mesh.context} attention is not modelled; use ulysses=, its a2a")


def stepped(optimizer: Optimizer, layout: Layout, notes: Notes, *, tied: bool) -> Optimizer:
    """The optimizer as the layout's framework runs it. Raises Unsupported."""
    if layout.mesh.plan != "megatron":
        return _one_by_one(optimizer, layout, notes)
    if not isinstance(optimizer, AdamW):
        raise Unsupported("layout.framework=megatron is modelled with its Adam alone; leave --optimizer out")
    shares = layout.dp * layout.mesh.cp if layout.style == "zero1" else 1
    why = "Megatron-Core's: fp32 gradients stay, fp32 weights and states are dealt among ranks with zero1 alone"
    notes.add("optimizer", f"Megatron's Adam, 1/{shares} of it", why)
    return MegatronAdam(shares=shares, tied=tied)


def looped(loop: Loop, layout: Layout) -> Loop:
    """The loop as the layout's framework has it: Megatron's gradients are a buffer that is counted with its states."""
    return replace(loop, grads_exist=True) if layout.mesh.plan == "megatron" else loop


def _one_by_one(optimizer: Optimizer, layout: Layout, notes: Notes) -> Optimizer:
    """The optimizer, one weight after another where torch would have taken them together: DTensors are no plain
    tensors (torch/optim/optimizer.py, _default_to_fused_or_foreach)."""
    if layout.mesh.tp == 1 or not isinstance(optimizer, AdamW) or optimizer.impl != "auto":
        return optimizer
    notes.add("optimizer.impl", "for-loop", "torch steps over split weights (DTensors) one at a time unless told")
    return replace(optimizer, impl="for-loop")
