"""What does not run where ranks share a layer's matrices, and how the optimizer steps there."""

from __future__ import annotations

from dataclasses import replace

from peftplan.arch.core import Arch
from peftplan.errors import RequestError, Unsupported
from peftplan.formats import Format
from peftplan.graph.blocks.kernels import Kernels
from peftplan.graph.blocks.setup import Setup
from peftplan.layouts import Layout
from peftplan.methods import Method
from peftplan.notes import Notes
from peftplan.optimizers import Optimizer
from peftplan.optimizers.adamw import AdamW

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"})
"""Those whose plan (base_model_tp_plan in transformers' configs) splits query, key, value, gate and up by columns,
output and down by rows, embedding and head by words."""


def check_shared(layout: Layout, arch: Arch, setup: Setup, fmt: Format, method: Method) -> None:
    """Raises RequestError for what the libraries cannot run split, Unsupported for what is not written down."""
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
    if type(setup.kernels) is not Kernels or setup.loss == "fused_head":
        raise Unsupported(f"{asked} with kernels or losses of other libraries is not modelled; use --kernels hf")
    if arch.family not in FAMILIES:
        raise Unsupported(
            f"{asked} is modelled for {', '.join(sorted(FAMILIES))} alone, not for {arch.family}; use --layout fsdp"
        )


def looped(optimizer: Optimizer, layout: Layout, notes: Notes) -> Optimizer:
    """The optimizer, one weight after another where torch would have taken them together: DTensors are no plain
    tensors (torch/optim/optimizer.py, _default_to_fused_or_foreach)."""
    if layout.mesh.tp == 1 or not isinstance(optimizer, AdamW) or optimizer.impl != "auto":
        return optimizer
    notes.add("optimizer.impl", "for-loop", "torch steps over split weights (DTensors) one at a time unless told")
    return replace(optimizer, impl="for-loop")
